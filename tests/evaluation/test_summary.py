"""What a run came to, in one sentence and a few figures, whatever stages it has."""

import pytest

from ppo_jax.evaluation.report.summary import headlines, read_run, unfinished, verdict
from tests.support.run_files import write_run

EVALUATED = {
    "gold/win_rate_ppo_vs_sft": 0.87,
    "gold/win_rate_ppo_vs_sft_interval": [0.83, 0.91],
    "policy/kl_per_response": 12.31,
    "judges": [{"judge": "gold", "num_prompts": 256}],
}
SFT = [
    {"stage": "sft", "step": step, "sft/loss": 5.0}
    | ({"sft/validation_perplexity": perplexity} if perplexity else {})
    for step, perplexity in ((0, 210.04), (50, 90.0), (60, None), (100, 84.12), (125, float("inf")))
]
ACCURACY = "reward_model/validation_accuracy"
REWARD = [
    {"stage": "reward", "step": 80, ACCURACY: 0.7701, f"{ACCURACY}_margin1": 0.88},
    {"stage": "reward", "step": 299, ACCURACY: 0.7964, f"{ACCURACY}_margin1": 0.9022}
    | {f"{ACCURACY}_margin2": 0.9411},
]
RATED = {"config": {"reward": {"format": "ratings", "batch_size": 32, "pairs_per_batch": 256}}}
COMPARED = {
    "config": {"reward": {"format": "preferences", "batch_size": 32, "pairs_per_batch": 256}}
}


def ppo(scores):
    return [
        {"stage": "ppo", "step": i + 1, "reward/score_mean": score, "kl/ref": i / 2}
        for i, score in enumerate(scores)
    ]


def a_run(folder, **files):
    return read_run(write_run(folder / "run", **files))


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            EVALUATED,
            "PPO is preferred to SFT in 87% of 256 unseen prompts by the gold judge (95% interval "
            "83% to 91%), at 12.3 nats of KL per response.",
        ),
        (
            {"gold/win_rate_ppo_vs_sft": 0.53, "gold/win_rate_ppo_vs_sft_interval": [0.47, 0.59]},
            "The difference between PPO and SFT is not significant: PPO is preferred in 53% of the "
            "unseen prompts by the gold judge (95% interval 47% to 59%).",
        ),
        (
            {"gold/win_rate_ppo_vs_sft": 0.2},
            "PPO lost to SFT: it is preferred in 20% of the unseen prompts by the gold judge.",
        ),
        ({}, "There is no result to report yet."),
    ],
)
def test_the_verdict_says_no_more_than_the_interval_allows(tmp_path, results, sentence):
    assert verdict(a_run(tmp_path, results=results)) == sentence


def test_sft_alone_tells_its_perplexity_from_the_first_to_the_last_validation(tmp_path):
    run = a_run(tmp_path, metrics=SFT, results={"time/total_s": 95})
    assert verdict(run) == (
        "SFT took the validation perplexity from 210.0 (step 0) to 84.1 (step 100)."
    )
    assert headlines(run) == [
        ("84.1", "validation perplexity after SFT", "210.0 at step 0, 100 steps in all"),
        ("1 min 35 s", "in all", "wall clock"),
    ]


def test_a_single_validation_is_told_as_one(tmp_path):
    run = a_run(tmp_path, metrics=SFT[1:2])
    assert verdict(run) == "SFT reached a validation perplexity of 90.0 at step 50."


def test_an_enormous_perplexity_is_told_shortly(tmp_path):
    row = {"stage": "sft", "step": 1, "sft/validation_perplexity": 1e304}
    assert "perplexity of 1.0e+304 at" in verdict(a_run(tmp_path, metrics=[row]))


def test_a_reward_model_alone_tells_its_accuracies_and_its_pairs(tmp_path):
    run = a_run(tmp_path, metrics=REWARD, config=RATED)
    assert verdict(run) == (
        "The reward model puts 79.6% of the unseen pairs in the right order (90.2% at a gap in "
        "rating of 1 or more, 94.1% at 2 or more), after 299 steps of up to 256 pairs."
    )
    assert headlines(run) == [
        ("79.6%", "reward-model accuracy", "on unseen pairs; 90.2% at a gap of 1 or more"),
        ("299", "reward-model steps", "up to 256 pairs each"),
    ]


def test_a_reward_model_of_comparisons_has_no_gaps(tmp_path):
    metrics = [{"stage": "reward", "step": 7, ACCURACY: 0.75}]
    run = a_run(tmp_path, metrics=metrics, config=COMPARED)
    assert verdict(run) == (
        "The reward model puts 75.0% of the unseen pairs in the right order, after 7 steps of 16 "
        "pairs."
    )
    assert headlines(run)[0] == ("75.0%", "reward-model accuracy", "on unseen pairs")


def test_an_accuracy_tells_how_many_pairs_it_is_of(tmp_path):
    row = {"stage": "reward", "step": 7, ACCURACY: 0.75, "reward_model/validation_pairs": 200}
    compared = a_run(tmp_path, metrics=[row], config={"reward": {"format": "preferences"}})
    told = "on 200 unseen pairs; 95% interval 68.6% to 80.5%"
    assert headlines(compared)[0] == ("75.0%", "reward-model accuracy", told)
    rated = compared._replace(config={"reward": {"format": "ratings"}})  # pairs share texts
    assert headlines(rated)[0][2] == "on 200 unseen pairs"
    results = {"reward_model/accuracy": 0.8, "reward_model/accuracy_margin1": 0.9}
    results |= {"reward_model/pairs_margin1": 1234, "policy/kl_per_response": 1.0}
    cards = headlines(rated._replace(results=results))
    evaluated = [note for _, what, note in cards if "accuracy" in what]
    assert evaluated == ["1,234 unseen pairs with a gap of 1 or more"]


def test_a_reward_model_without_its_config_tells_the_steps_alone(tmp_path):
    run = a_run(tmp_path, metrics=REWARD)
    assert verdict(run).endswith(", after 299 steps.")
    assert headlines(run)[1] == ("299", "reward-model steps", "of the optimizer")


def test_ppo_alone_tells_its_score_from_the_first_to_the_last_iterations_and_the_kl(tmp_path):
    run = a_run(tmp_path, metrics=ppo([0.0, 0.1, 0.2, 0.3, 0.4] + [9.0] * 20 + [1.0, 2.0] * 5))
    assert verdict(run) == (
        "PPO took the mean score from 0.20 in the first 5 iterations to 1.60 in the last 5, at "
        "16.0 nats of KL per response."
    )
    assert headlines(run) == [
        ("1.60", "mean score, last 5 iterations", "0.20 in the first 5"),
        ("16.0 nats", "KL per response", "from the reference policy"),
    ]


def test_a_critic_alone_tells_what_it_explains(tmp_path):
    """Value pretraining: score and KL of a policy that stays as it is say nothing."""

    def rows(rates):
        explained = [-0.6, 0.2, 0.3, 0.4]
        both = zip(ppo([0.1, 0.2, 0.1, 0.2]), explained, rates, strict=True)
        more = ("value/explained_variance", "policy/learning_rate")
        return [row | dict(zip(more, values, strict=True)) for row, *values in both]

    run = a_run(tmp_path, metrics=rows([0.0] * 4))
    assert verdict(run) == (
        "PPO trained the critic alone: its explained variance went from -0.60 in the first "
        "iteration to 0.40 in the last."
    )
    card = ("0.40", "explained variance of the critic, last iteration", "-0.60 in the first")
    assert headlines(run) == [card]
    # A policy that has begun to move is told by its score.
    run = a_run(tmp_path, metrics=rows([0.0, 0.0, 1e-3, 1e-3]))
    assert verdict(run).startswith("PPO took the mean score from 0.10")


def test_the_ends_of_a_short_ppo_run_do_not_overlap(tmp_path):
    run = a_run(tmp_path, metrics=ppo([0.1, 0.2, 0.9]))
    assert verdict(run) == (
        "PPO took the mean score from 0.10 in the first iteration to 0.90 in the last, at 1.0 "
        "nats of KL per response."
    )


def test_the_latest_stage_gives_the_verdict_and_every_stage_a_figure(tmp_path):
    run = a_run(tmp_path, metrics=SFT + REWARD + ppo([0.1, 0.9]), config=RATED)
    assert verdict(run).startswith("PPO took the mean score")
    assert [what for _, what, _ in headlines(run)] == [
        "mean score, last iteration",
        "KL per response",
        "reward-model accuracy",
        "reward-model steps",
        "validation perplexity after SFT",
    ]
    assert verdict(run._replace(metrics=SFT + REWARD)).startswith("The reward model puts")


def test_an_evaluated_run_has_the_figures_of_the_evaluation(tmp_path):
    results = EVALUATED | {
        "reward_model/accuracy": 0.8,
        "reward_model/accuracy_margin1": 0.912,
        "reference": {"human rater": 0.943},
        "text/distinct2_base": 0.9,
        "text/distinct2_sft": 0.9,
        "text/distinct2_ppo": 0.73,
        "text/distinct2_ratio": 0.81,
    }
    run = a_run(tmp_path, metrics=SFT + REWARD + ppo([0.1, 0.9]), results=results)
    assert headlines(run) == [
        ("87.0%", "prefer PPO to SFT", "95% interval 83.0% to 91.0%"),
        ("12.3 nats", "KL per response", "from the SFT policy"),
        ("91.2%", "reward-model accuracy", "gap of 1 or more; a human rater 94.3%"),
        ("81%", "of SFT's distinct-2", "variety of word pairs"),
    ]


def test_ppo_that_began_from_the_base_model_is_not_compared_with_sft(tmp_path):
    results = {"policy/kl_per_response": 3.0, "text/distinct2_base": 0.9, "text/distinct2_ppo": 0.4}
    run = a_run(tmp_path, metrics=ppo([0.1]), results=results | {"text/distinct2_ratio": 0.5})
    assert headlines(run)[1:] == [
        ("3.0 nats", "KL per response", "from the base policy"),
        ("50%", "of base's distinct-2", "variety of word pairs"),
    ]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"metrics": [*SFT, *ppo([0.5])], "steps": {"sft": 125, "ppo": 1}}, ""),
        ({"metrics": SFT, "steps": {"sft": 125, "ppo": 1}}, "ppo is at step 0 of 1"),
        ({"metrics": SFT, "steps": {"sft": 300}}, "sft is at step 125 of 300"),
        # results.json has times from the start of a run on: it says nothing of its end.
        (
            {"config": {"config": {"sft": {}, "ppo": {"a": 1}, "evaluate": {"a": 1}}}}
            | {"results": {"time/prepare_s": 1.0}},
            "ppo has not begun, nothing is evaluated yet",
        ),
        ({"config": {"config": {"evaluate": {"a": 1}}}, "results": {"evaluated": {}}}, ""),
        # PPO alone, from another run's models.
        (
            {"config": {"config": {"sft": {"a": 1}, "reward": {"a": 1}, "ppo": {"a": 1}}}}
            | {"metrics": ppo([0.5]), "steps": {"ppo": 1}},
            "",
        ),
        (
            {"config": {"config": {"sft": {"a": 1}, "reward": {"a": 1}, "ppo": {"a": 1}}}}
            | {"metrics": REWARD, "steps": {"reward": 299}},
            "ppo has not begun",
        ),
    ],
)
def test_what_a_run_has_yet_to_do_is_told(tmp_path, files, told):
    assert unfinished(a_run(tmp_path, **files)) == told


def test_any_policies_are_compared_by_the_headline_judge_of_the_panel(tmp_path):
    results = {
        **{"text/distinct2_ppo": 0.8, "text/distinct2_best_of_4": 0.9, "text/distinct2_ratio": 1.1},
        **{"policy/kl_per_response": 0.6, "gold/win_rate_best_of_4_vs_ppo": 0.6},
        **{"gold/win_rate_best_of_4_vs_ppo_interval": [0.55, 0.65], "headline_judge": "tf-idf"},
    }
    run = a_run(tmp_path, results=results)
    assert verdict(run) == (
        "best_of_4 is preferred to PPO in 60% of the unseen prompts by the tf-idf judge (95% "
        "interval 55% to 65%), at 0.6 nats of KL per response."
    )
    assert headlines(run)[0][1] == "prefer best_of_4 to PPO"
    assert headlines(run)[1][2] == "from the PPO policy"
