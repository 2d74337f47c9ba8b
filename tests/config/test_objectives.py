"""Names of estimators and losses, and functions of the user's in their place."""

import itertools
import math

import pytest

from ppo_jax.config.objectives import (
    ADVANTAGES,
    LOSSES,
    advantage_function,
    loss_function,
    needs_critic,
    needs_greedy,
    needs_groups,
)
from ppo_jax.config.run import from_config_dict
from ppo_jax.core.masking import masked_mean
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.run_files import read_jsonl
from tests.support.tiny_config import changed

HERE = __name__


def half(rewards, values, mask, *, gamma):
    """An estimator of the user's, with a critic and without returns."""
    return 0.5 * (rewards + gamma - values) * mask


def plain(logprobs, advantages, mask, *, normalizer):
    """A loss of the user's, without weights."""
    return -masked_mean(logprobs * advantages, mask, normalizer=normalizer), {}


DECOUPLED = {"loss": "decoupled", "old_logprobs": "recompute"}


def greedy(scores, reference_text):
    return scores


MOVING = {"ref_ema_decay": 0.9, "kl_control": "fixed"}
TWO = {"num_critics": 2, "entropy_coef": 0.01}
BINS = {"value_bins": 8, "value_range": (-3.0, 2.0)}


def test_what_an_estimator_needs_is_known_from_its_parameters():
    assert [name for name in ADVANTAGES if needs_critic(name)] == ["gae"]
    without_groups = {"gae", "reinforce", "reinforce_plus_plus", "remax"}
    assert {name for name in ADVANTAGES if not needs_groups(name)} == without_groups
    assert [name for name in ADVANTAGES if needs_greedy(name)] == ["remax"]
    assert needs_critic(f"{HERE}:half") and not needs_groups(f"{HERE}:half")
    assert advantage_function(f"{HERE}:half").__wrapped__ is half
    assert loss_function(f"{HERE}:plain").__wrapped__ is plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "grpo"}, "ppo.samples_per_prompt must be at least 2 with advantage='grpo'"),
        (
            {"advantage": f"{HERE}:greedy"},
            "reference_text; there is rewards, values, mask",
        ),
        ({"advantage": f"{HERE}:nowhere"}, "ppo.advantage must be 'module:function'"),
        ({"loss": "nowhere:loss"}, "ppo.loss must be 'module:function'"),
        ({"loss": f"{HERE}:plain", "aggregation": "constant"}, "which takes no weights"),
        ({"loss": "gspo", "aggregation": "sequence_mean"}, "'token_mean' with loss='gspo'"),
        ({"dual_clip": 2.0}, "ppo.dual_clip must be 3 unless the loss takes it, which"),
        ({"loss": "dual_clip", "dual_clip": 1.0}, "ppo.dual_clip must be > 1"),
        ({"penalty_coef": 2.0}, "unless the loss takes it"),
        (
            {"penalty_target_kl": 0.01},
            "must be 0 unless the loss takes a penalty_coef",
        ),
        (
            {"baseline_decay": 0.5},
            "must be 0.9 unless the advantage takes a baseline",
        ),
        ({"advantage": "reinforce", "baseline_decay": 1.5}, r"in \[0, 1\]"),
        ({"target_entropy": -1.0}, "target_entropy must be >= 0"),
        ({"entropy_coef_step": 0.1}, "entropy_coef_step must be 0.005 without target_entropy"),
        ({"target_entropy": 1.0, "entropy_coef_step": 0.0}, "entropy_coef_step must be > 0"),
        ({"ref_ema_decay": 1.5}, r"ref_ema_decay must be in \[0, 1\]"),
        ({"ref_ema_decay": 0.9, "ref_reset_every": 2}, "0 unless ref_ema_decay is 1"),
        ({"kl_loss_coef": -0.1}, ">= 0"),
        (
            DECOUPLED | {"tis_clip_high": 2.0},
            "1 with loss='decoupled', which has the weights itself",
        ),
        ({"loss": "kl_cov", "covariance_low": 0.5}, "covariance_low must be 1 unless the loss"),
        (
            {"loss": "kl_cov", "covariance_fraction": 1.5},
            r"fraction must be in \(0, 1\]",
        ),
        ({"loss": "clip_cov", "penalty_coef": 2.0}, "penalty_coef must be 1 unless the loss takes"),
        (
            {"loss": "clip_cov", "covariance_high": 0.5},
            r"covariance_high must be above covariance_low \(1\), got 0.5",
        ),
        (
            {"max_rollouts": 2, "samples_per_prompt": 2, "prompt_buckets": 2},
            "max_rollouts must be 1 with prompt_buckets",
        ),
        (
            {"max_rollouts": 2, "samples_per_prompt": 2, "advantage": "remax"},
            "max_rollouts must be 1 with advantage='remax', which has greedy",
        ),
        (DECOUPLED | {"old_logprobs": "rollout"}, "old_logprobs must be 'recompute' with loss="),
        (DECOUPLED | {"behavior_weight_limit": 0.0}, "ppo.behavior_weight_limit must be > 0"),
        ({"reference_responses": -1}, "reference_responses must be >= 0"),
        (
            {"reference_responses": 1, "max_rollouts": 2, "samples_per_prompt": 2},
            "max_rollouts must be 1 with reference_responses",
        ),
        (
            {"reference_responses": 1, "score_normalization": True},
            "score_normalization must be False with reference_responses",
        ),
        (
            {"reference_responses": 1, "score_clip": 5.0},
            "score_clip must be inf with reference_responses",
        ),
        (
            {"reference_responses": 3, "max_concurrent": 2},
            r"max_concurrent must be a multiple of reference_responses \(3\)",
        ),
        ({"value_gae_lambda": 1.5}, r"in \[0, 1\], or -1"),
        ({"loss": "policy_gradient", "clip_range": 0.1}, "clip_range must be 0.2 unless the loss"),
        ({"loss": "kl_cov", "clip_range_high": 0.3}, "clip_range_high must be 0 unless the loss"),
        (
            {"loss": "kl_penalty", "penalty_target_kl": 0.1, "penalty_coef": 0.0},
            "penalty_coef must be > 0 with penalty_target_kl",
        ),
        ({"advantage": "remax", "whiten_rewards": True}, "whiten_rewards must be False with adv"),
        ({"advantage": "remax", "whiten_advantages": False}, "whiten_advantages must be True with"),
        ({"ref_reset_every": 2, "kl_control": "adaptive"}, "kl_control must be 'fixed' with a"),
        ({"ref_ema_decay": 0.9, "trainable": "lora"}, "ref_ema_decay must be 1 with trainable="),
        ({"gae_lambda_alpha": 0.1, "gae_lambda": 0.5}, "gae_lambda must be 0.95 with gae_lambda_a"),
        ({"critic_warmup_tolerance": 0.1}, "tolerance must be 0 without critic_warmup"),
        ({"value_updates": 0}, "> 0"),
        ({"value_num_minibatches": 5}, "value_num_minibatches x num_micro_batches"),
        ({"value_updates": 2, "vf_coef": 0.5}, "an optimizer of its own has no weight"),
        ({"value_optimizer.b1": 1.5}, r"ppo.value_optimizer.b1 must be in \[0, 1\)"),
        ({"value_optimizer.schedule": "step"}, "ppo.value_optimizer.schedule must be one of"),
        ({"clip_range": -math.inf}, "finite"),
        ({"value_bins": 1, "value_range": (-1, 1)}, "ppo.value_bins must be at least 2, or 0"),
        ({"value_bins": -2}, "ppo.value_bins must be at least 2, or 0"),
        ({"value_range": (-1.0, 1.0)}, r"ppo.value_range must be \(\) without value_bins"),
        ({"value_bins": 8}, "ppo.value_range must be two finite numbers with value_bins"),
        ({"value_bins": 8, "value_range": (2.0, 1.0)}, "the lower one first"),
        ({"value_bins": 8, "value_range": (0.0, 1.0, 2.0)}, "two finite numbers"),
        ({**BINS, "value_clip_range": 0.5}, "the loss of a critic with bins has no clip"),
        ({**BINS, "num_critics": 2}, "ppo.value_bins must be 0 with several critics"),
        ({"num_critics": 0}, "> 0"),
        ({"num_critics": 3}, "num_critics x samples_per_prompt"),
        ({"vf_coef": 0.0}, "vf_coef must be > 0: with value_learning_rate=0 the critic stays"),
        ({"loss": "dppo", "divergence_limit": 2.0}, r"divergence_limit must be in \[0, 1\]"),
        ({"loss": "clip_cov", "covariance_fraction": 0.0}, r"fraction must be in \(0, 1\]"),
        ({"loss": "policy_gradient", "clip_range": 0.1}, "which 'policy_gradient' does not"),
        ({"vf_coef": 0.0, "shared_critic": True}, "vf_coef must be > 0 with shared_critic"),
        ({"shared_critic": True, "value_optimizer.b1": 0.5}, r"left out .* got \{'b1': 0.5\}"),
        (
            {"advantage": "rloo", "samples_per_prompt": 2, "value_optimizer.b1": 0.5},
            r"which has no critic, got \{'b1': 0.5\}",
        ),
        ({"advantage": "rlo"}, r"'remax'\] or 'module:function', got 'rlo'"),
        ({"value_optimizer.B1": 0.5}, "did you mean 'ppo.value_optimizer.b1'"),
        ({"shared_critic": True, "critic_init_from": "policy"}, "critic_init_from must be '' with"),
        (
            {"shared_critic": True, "value_trainable": 1},
            "value_trainable must be 'all' with",
        ),
        (
            {"shared_critic": True, "value_updates": 2},
            "value_updates must be 1 with shared_critic",
        ),
        ({"agreed_fraction": 0.2}, "0 with one critic, which agrees with itself"),
        ({"num_critics": 2, "agreed_fraction": 1.0}, r"ppo.agreed_fraction must be in \[0, 1\)"),
        ({"disputed_fraction": 0.2, "entropy_coef": 0.1}, "disputed_fraction must be 0 with one"),
        (TWO | {"disputed_fraction": 1.0}, r"ppo.disputed_fraction must be in \[0, 1\)"),
        (
            TWO | {"disputed_fraction": 0.2, "entropy_coef": 0.0},
            "disputed_fraction must be 0 without entropy_coef or target_entropy",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(changed({f"ppo.{name}": value for name, value in changes.items()}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("critic_warmup", 2),
        ("value_updates", 2),
        ("value_num_minibatches", 2),
        ("gae_lambda_alpha", 0.05),
        ("value_gae_lambda", 1.0),
        ("value_bins", 2),
        ("num_critics", 2),
        ("shared_critic", True),
        ("value_optimizer.b1", 0.5),
        ("critic_init_from", "policy"),
    ],
)
def test_a_setting_of_the_critic_without_one_is_one_line(field, value):
    free = {"ppo.advantage": "rloo", "ppo.samples_per_prompt": 2, f"ppo.{field}": value}
    free |= {"ppo.value_range": (0.0, 1.0)} if field == "value_bins" else {}
    with pytest.raises(ValueError, match="which has no critic"):
        from_config_dict(changed(free))


def test_the_old_name_of_the_setting_is_taken_with_a_warning():
    config = changed({"ppo.samples_per_prompt": 2})
    config["ppo"]["advantages"] = "leave_one_out"
    with pytest.warns(FutureWarning, match="ppo.advantages is now ppo.advantage"):
        assert from_config_dict(config).ppo.advantage == "leave_one_out"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run with a base model and a prompts file alone."""
    folder = tmp_path_factory.mktemp("start")
    config = tiny_run.config()
    pipeline.run({name: config[name] for name in ("prepare", "model", "sft")}, folder)
    return folder


METHODS = [
    {"advantage": "grpo", "aggregation": "sequence_mean", "kl_loss_coef": 0.1},
    {"advantage": "dr_grpo", "aggregation": "constant", "loss": "dual_clip"},
    {"advantage": "reinforce_plus_plus", "loss": "cispo"},
    {"advantage": "reinforce_plus_plus_baseline", "loss": "gspo", "num_micro_batches": 2},
    {"advantage": "rloo", "loss": "policy_gradient", "packing": True, "num_micro_batches": 2},
    {"advantage": f"{HERE}:half", "loss": f"{HERE}:plain"},
    {"loss": "kl_penalty", "clip_range": math.inf, "critic_warmup": 1, "value_gae_lambda": 1.0},
    {"advantage": "reinforce", "baseline_decay": 0.5, "gamma": 0.9, **MOVING},
    {"advantage": "remax", "missing_eos": "penalty"},
    {"reference_responses": 3, "missing_eos": "penalty", **MOVING},
    {"loss": "dppo", "value_updates": 2, "gae_lambda_alpha": 0.05},
    {"loss": "clip_cov", "covariance_low": 0.0, "packing": True, "num_micro_batches": 2},
    {"loss": "kl_cov", "advantage": "rloo", "covariance_fraction": 0.1},
    {"loss": "decoupled", "old_logprobs": "recompute", "behavior_weight_limit": 2.0},
    {**BINS, "packing": True, "num_micro_batches": 2, "aggregation": "sequence_mean"},
    {"num_critics": 2, "agreed_fraction": 0.2, "num_micro_batches": 2},
    {"shared_critic": True, "value_trainable": "all", "old_logprobs": "recompute"},
    TWO | {"disputed_fraction": 0.2, "packing": True, "num_micro_batches": 2},
]


def test_the_methods_are_all_there():
    used = set(itertools.chain.from_iterable(x.items() for x in METHODS))
    assert {x for name, x in used if name == "advantage"} >= ADVANTAGES.keys() - {
        "gae",
        "leave_one_out",
    }
    assert {x for name, x in used if name == "loss"} >= LOSSES.keys() - {"clip"}


OF_RUN = dict(
    init_from="base",
    reward_model="",
    reward_function="tests.support.tiny_run:letters",
    samples_per_prompt=2,
    num_iterations=2,
    num_samples=0,
)


@pytest.mark.parametrize("method", METHODS, ids=lambda x: " ".join(map(str, x.values())))
def test_a_run_by_each_method_is_finite_and_has_a_critic_where_it_needs_one(
    start, tmp_path, capsys, method
):
    pipeline.run(tiny_run.on_base(start, ppo=OF_RUN | method), tmp_path)
    output = capsys.readouterr().out
    assert ("4 more an iteration, one to each prompt" in output) == ("remax" in method.values())
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["stage"] == "ppo"]
    assert len(rows) == 2
    of_reference = "reference_responses" in method
    assert ("12 more an iteration, 3 to each prompt" in output) == of_reference
    assert [row.get("reward/reference_episodes") for row in rows] == (
        [12, 24] if of_reference else [None] * 2
    )
    if of_reference:  # the numbers of letters, as probabilities, less what is lost for the end
        assert all(-1 <= row["reward/adjusted_score_mean"] <= 1 for row in rows)
    assert ("critic update" in output) == ("value_updates" in method)
    told = ["the first iteration, in which the policy stays" in output]
    told += ["explained variance" in output]
    assert told == 2 * ["critic_warmup" in method]
    assert ("makes lambda less than 0.5 up to 40 tokens" in output) == (
        method.get("gae_lambda_alpha") == 0.05
    )
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    with_critic = needs_critic(method.get("advantage", "gae"))
    assert ("value/loss" in rows[0]) == with_critic
    assert ("kl/loss" in rows[0]) == ("kl_loss_coef" in method)
    if "value_bins" in method:
        assert "8 bins of returns from -3 to 2; its head is new and zero" in output
        assert abs(rows[0]["value/mean"] + 0.5) < 1e-6 and rows[1]["value/mean"] != -0.5
    assert ("value/outside_bins" in rows[0]) == ("value_bins" in method)
    assert ("value/disagreement" in rows[0]) == ("num_critics" in method)
    assert ("value/disputed_fraction" in rows[0]) == ("disputed_fraction" in method)
    of_two = "2 with random heads; each learns one prompt in 2"
    assert (of_two in output) == ("num_critics" in method)
    on_policy = "33 parameters, a head on the policy's body"
    assert (on_policy in output) == ("shared_critic" in method)
    assert rows[1]["policy/approx_kl"] > 0 or "critic_warmup" in method
    if "critic_warmup" in method:
        assert rows[0]["policy/learning_rate"] == 0 < rows[1]["policy/learning_rate"]
        assert rows[0]["policy/approx_kl"] < 1e-8 and rows[0]["value/learning_rate"] > 0
