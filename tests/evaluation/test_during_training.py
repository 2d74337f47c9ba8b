"""Which prompts PPO is evaluated on while it trains, and what its judges are asked."""

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.evaluation.during_training import ask_judges, training_prompts
from ppo_jax.evaluation.judges import JudgePanel
from tests.support import tiny_config, tiny_stage


def lengths(texts):
    return [float(len(text)) for text in texts]


def test_the_headline_judge_is_gold_and_others_have_names_for_metrics():
    judges = {"two experts": lengths, "gold": lambda texts: [1.0] * len(texts), "x": lengths}
    scores = ask_judges(JudgePanel(judges=judges, headline="x"), ["a", "bc"])
    assert {name: x.tolist() for name, x in scores.items()} == {
        "two_experts": [1.0, 2.0],
        "gold": [1.0, 2.0],
    }
    with pytest.raises(ValueError, match="the judge 'bad' must return 1 finite numbers"):
        ask_judges(JudgePanel(judges={"bad": lambda texts: ["good"]}), ["a"])


def config(path, **ppo):
    section = {"ppo.evaluate_every": 1, "evaluate.judges": "a:b", "evaluate.prompts": str(path)}
    return from_config_dict(
        tiny_config.changed(section | {f"ppo.{name}": value for name, value in ppo.items()})
    )


def test_the_prompts_are_the_last_of_the_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "the film {i}", "answer": {i}}}\n' for i in range(5)))
    tokenizer = tiny_stage.byte_tokenizer()
    data = training_prompts(config(path, evaluate_prompts=2), tokenizer)
    assert data.texts == ["the film 3", "the film 4"] and data.columns == {}
    pairs = zip(data.prompts.tokens, data.prompts.mask, strict=True)
    rows = [row[kept].tolist() for row, kept in pairs]
    assert tokenizer.batch_decode(rows) == data.texts
    scored = {"reward_model": "", "reward_function": f"{__name__}:right", "evaluate_prompts": 2}
    assert training_prompts(config(path, **scored), tokenizer).columns == {"answer": [3, 4]}
    with pytest.raises(ValueError, match="ppo.evaluate_prompts must be at most the 5 prompts of "):
        training_prompts(config(path, evaluate_prompts=6), tokenizer)


def right(prompts, responses, answer):
    return answer
