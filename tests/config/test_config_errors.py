"""Every setting that makes no sense is refused, with its field, its value and what is allowed."""

import math

import pytest

from ppo_jax.config.run import from_config_dict
from tests.support.tiny_config import changed

BAD = [
    # (field, value, in the message besides the field)
    ("sed", 1, "unknown setting sed"),
    ("ppo.kl_coeff", 0.1, "unknown setting ppo.kl_coeff"),
    ("ppo.optimizer.lr", 0.1, "unknown setting ppo.optimizer.lr"),
    ("model.scratch.depth", 2, "unknown setting model.scratch.depth"),
    ("evaluate.judge", "", "unknown setting evaluate.judge"),
    # not there
    ("model", ..., "model must be given"),
    ("sft.data", ..., "sft.data must be given"),
    ("sft.optimizer", ..., "sft.optimizer must be given"),
    ("ppo.prompts", ..., "ppo.prompts must be given"),
    ("ppo.optimizer", ..., "ppo.optimizer must be given"),
    ("ppo.optimizer.learning_rate", ..., "ppo.optimizer.learning_rate must be given"),
    ("evaluate.prompts", ..., "evaluate.prompts must be given"),
    ("model.vocabulary_data", ..., "train the tokenizer"),
    ("ppo", None, "evaluate needs a ppo section"),
    # of another type
    ("seed", 1.0, "1.0"),
    ("seed", True, "True"),
    ("sft", "texts.jsonl", "a section of settings"),
    ("sft.batch_size", "32", "'32'"),
    ("sft.batch_size", 32.0, "32.0"),
    ("sft.data", None, "None"),
    ("sft.optimizer", 1e-3, "a section of settings"),
    ("reward.optimizer.warmup_steps", 2.5, "2.5"),
    ("ppo.kl_coef", "0.1", "'0.1'"),
    ("ppo.kl_coef", True, "True"),
    ("ppo.stop_tokens", "<end>", "'<end>'"),
    ("ppo.stop_tokens", [1], "[1]"),
    ("ppo.stop_tokens", ["<end>", ""], "('<end>', '')"),
    ("model.scan_layers", 1, "1"),
    # no number
    ("ppo.kl_coef", math.nan, "finite"),
    ("sft.num_epochs", math.inf, "finite"),
    ("sft.optimizer.learning_rate", math.inf, "finite"),
    ("sft.hidden_cache_gb", -math.inf, "finite"),
    # out of range
    ("seed", -1, ">= 0"),
    ("sft.num_epochs", 0.0, "> 0"),
    ("sft.batch_size", 0, "> 0"),
    ("sft.max_length", -4, "> 0"),
    ("sft.eval_every", 0, "> 0"),
    ("sft.save_every", 0, "> 0"),
    ("sft.data", "", "data set"),
    ("sft.validation_fraction", 0.0, "(0, 1)"),
    ("sft.validation_fraction", 1.0, "(0, 1)"),
    ("sft.hidden_cache_gb", -2.5, "-2.5"),
    ("reward.num_layers", -1, ">= 0"),
    ("reward.pairs_per_batch", 0, "> 0"),
    ("ppo.samples_per_prompt", 3, "multiple of samples_per_prompt (3)"),
    ("ppo.samples_per_prompt", 0, "> 0"),
    ("ppo.logits_chunk", -1, ">= 0"),
    (
        "ppo.packing",
        True,
        "False unless num_micro_batches > 1: it saves whole micro-batches, got True",
    ),
    (
        "ppo.max_concurrent",
        -1,
        "0, or a multiple of samples_per_prompt (1) up to rollout_batch_size",
    ),
    ("ppo.max_concurrent", 128, "up to rollout_batch_size (64), got 128"),
    ("ppo.min_free_slots", 4, "0 without max_concurrent, got 4"),
    ("ppo.advantage", "grp", "or 'module:function', got 'grp'"),
    ("ppo.loss", "trpo", "or 'module:function', got 'trpo'"),
    ("reward.batch_size", 1, ">= 2"),
    ("ppo.num_iterations", 0, "> 0"),
    ("ppo.response_length", 0, "> 0"),
    ("ppo.temperature", 0.0, "> 0"),
    ("ppo.temperature", 1e-38, ">= 1e-06"),
    ("ppo.kl_coef", -0.1, ">= 0"),
    ("ppo.vf_coef", -0.1, ">= 0"),
    ("ppo.value_learning_rate", -1e-3, ">= 0"),
    ("ppo.gamma", 1.1, "[0, 1]"),
    ("ppo.gae_lambda", -0.1, "[0, 1]"),
    ("ppo.clip_range", 0.0, "(0, 1], or inf"),
    ("ppo.clip_range", 1.1, "(0, 1], or inf"),
    ("ppo.clip_range_high", 0.1, "0 or at least clip_range (0.2), got 0.1"),
    ("ppo.clip_range_high", -0.1, "0 or at least clip_range (0.2), got -0.1"),
    ("ppo.value_clip_range", 0.0, "> 0"),
    ("ppo.prompt_buckets", 0, "> 0"),
    ("ppo.prompt_buckets", 20, "halves of max_prompt_length"),
    ("ppo.tis_clip_low", -0.1, "in [0, 1]"),
    ("ppo.tis_clip_low", 0.5, '1 unless old_logprobs is "recompute"'),
    ("ppo.tis_clip_high", 0.5, ">= 1"),
    ("ppo.tis_clip_high", 2.0, '1 unless old_logprobs is "recompute"'),
    ("ppo.max_rollouts", 0, "> 0"),
    ("ppo.max_rollouts", 2, "1 with samples_per_prompt=1: a group of one has no variance"),
    ("ppo.importance", "tokens", "one of ['token', 'sequence', 'sequence_mean', 'icepop']"),
    ("ppo.importance", "icepop", "'token' unless tis_clip_low is below tis_clip_high"),
    ("ppo.covariance_fraction", 0.1, "0.0002 unless the loss takes it, which"),
    ("ppo.covariance_low", 0.1, "1 unless the loss takes it"),
    ("ppo.covariance_high", math.inf, "5 unless the loss takes it"),
    ("ppo.behavior_weight_limit", 2.0, "inf unless the loss takes it, which"),
    ("ppo.top_k", -1, ">= 0"),
    ("ppo.top_p", 0.0, "(0, 1]"),
    ("ppo.top_p", 1.5, "(0, 1]"),
    ("ppo.min_p", 1.5, "[0, 1]"),
    ("ppo.target_kl", 0.0, "> 0"),
    ("ppo.kl_horizon", 12.0, ">= 12.8, a fifth of rollout_batch_size"),
    ("ppo.num_samples", -1, ">= 0"),
    ("evaluate.num_prompts", 0, "> 0"),
    ("evaluate.temperature", -0.5, ">= 0"),
    ("evaluate.temperature", 1e-38, "0 or >= 1e-06"),
    ("model.scratch.vocab_size", 256, ">= 300"),
    ("model.scratch.num_layers", 0, "> 0"),
    # no such choice
    ("model.dtype", "int8", "bfloat16"),
    ("model.attention", "flash", "'plain'"),
    ("reward.format", "pairs", "preferences"),
    ("ppo.missing_eos", "ignore", "penalty"),
    ("ppo.score_clip", 0.0, "> 0"),
    ("ppo.overlong_tokens", -1, "from 0, which is off, to response_length (64)"),
    ("ppo.overlong_tokens", 65, "from 0, which is off, to response_length (64)"),
    ("ppo.kl_estimator", "k4", "k3"),
    ("ppo.kl_estimator", "k2", "or any_kl_estimator True"),
    ("ppo.kl_estimator", "k3", "push the policy away from the reference"),
    ("ppo.kl_control", "none", "adaptive"),
    ("ppo.old_logprobs", "sampled", "recompute"),
    ("ppo.critic_init_from", "ppo@3", "a stage before ppo"),
    ("sft.trainable", "top", "'head'"),
    ("sft.trainable", "0", ">= 1"),
    ("sft.trainable", -1, ">= 1"),
    ("sft.trainable", 1.5, "1.5"),
    ("reward.trainable", True, "True"),
    ("ppo.trainable", "", "'all'"),
    ("ppo.value_trainable", "none", "'lora'"),
    # of adapters
    ("sft.lora.rank", 0, "> 0"),
    ("reward.lora.alpha", -1.0, "> 0"),
    ("ppo.lora.targets", [], "some of ['query', 'key', 'value', 'output', 'up', 'gate', 'down']"),
    ("ppo.lora.targets", ["query", "query"], "each once"),
    ("ppo.lora.targets", ["q_proj"], "each once, got ('q_proj',)"),
    ("ppo.lora.dropout", 0.1, "unknown setting ppo.lora.dropout"),
    ("sft.lora.rank", 8, "must be 16 unless sft.trainable is 'lora', got 8"),
    ("reward.lora.alpha", 8.0, "must be 32.0 unless reward.trainable is 'lora', got 8.0"),
    ("ppo.lora.rank", 8, "unless ppo.trainable or ppo.value_trainable is 'lora', got 8"),
    # sizes that do not divide
    ("model.scratch.embed_dim", 100, "multiple of 2 x num_heads (8)"),
    ("sft.num_micro_batches", 5, "multiple of num_micro_batches (5)"),
    ("ppo.num_minibatches", 3, "multiple of num_minibatches x num_micro_batches (3)"),
    ("reward.batch_size", 1, ">= 2"),
    # both, or neither
    ("model.path", "some/folder", "either"),
    ("model.scratch", None, "either"),
    ("ppo.reward_function", "module:function", "either"),
    ("ppo.reward_model", "", "either"),
]
# The field that a message names, where it is the other one of two.
NAMED = {
    "sft.num_micro_batches": "sft.batch_size",
    "ppo.num_minibatches": "ppo.rollout_batch_size",
    "ppo.samples_per_prompt": "ppo.",
    "model.scratch": "model",
    "model.path": "model",
    "ppo.reward_function": "reward_function=",
    "ppo.reward_model": "reward_model=",
}


@pytest.mark.parametrize(("field", "value", "words"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_setting_is_refused_with_its_field(field, value, words):
    with pytest.raises(ValueError) as error:
        from_config_dict(changed({field: value}))
    assert NAMED.get(field, field) in str(error.value)
    assert words in str(error.value)


OPTIMIZER_BAD = [
    ("learning_rate", -1e-3, ">= 0"),
    ("schedule", "step", "cosine"),
    ("warmup_steps", -1, ">= 0"),
    ("final_fraction", 1.5, "[0, 1]"),
    ("max_grad_norm", 0.0, "> 0"),
    ("weight_decay", -0.1, ">= 0"),
    ("b1", 1.0, "[0, 1)"),
    ("b2", -0.1, "[0, 1)"),
    ("eps", 0.0, "> 0"),
]


@pytest.mark.parametrize("section", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(("field", "value", "words"), OPTIMIZER_BAD)
def test_a_bad_optimizer_is_refused_with_its_stage(section, field, value, words):
    with pytest.raises(ValueError) as error:
        from_config_dict(changed({f"{section}.optimizer.{field}": value}))
    assert f"{section}.optimizer.{field}" in str(error.value)
    assert words in str(error.value)


def test_adapters_have_settings_where_something_is_trained_by_them():
    rank = {"ppo.lora.rank": 8}
    for field in ("ppo.trainable", "ppo.value_trainable"):
        assert from_config_dict(changed(rank | {field: "lora"})).ppo.lora.rank == 8
    with pytest.raises(ValueError, match="sft.lora.rank must be 16 unless sft.trainable is 'lora'"):
        from_config_dict(changed({"sft.lora.rank": 8, "ppo.trainable": "lora"}))


def test_a_critic_cannot_start_from_a_reward_model_that_is_not_there():
    by_function = {"ppo.reward_model": "", "ppo.reward_function": "module:function"}
    for source in ("", "policy"):
        assert from_config_dict(changed(by_function | {"ppo.critic_init_from": source}))
    with pytest.raises(
        ValueError, match="ppo.critic_init_from must be 'policy', 'scratch', '' or a model"
    ):
        from_config_dict(changed(by_function | {"ppo.critic_init_from": "reward_model"}))


def test_a_critic_from_scratch_is_trained_whole():
    scratch = {"ppo.critic_init_from": "scratch", "ppo.value_trainable": "2"}
    with pytest.raises(ValueError, match="ppo.value_trainable must be 'all' with critic_init_from"):
        from_config_dict(changed(scratch))
