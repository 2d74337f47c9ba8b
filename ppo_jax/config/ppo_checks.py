"""What the settings of PPO must be, and which of them go together: one line says what does not.

Every function takes the settings and their `Check`.
"""

import math
import re
from typing import Any

from ppo_jax.config.objectives import (
    AVERAGE,
    advantage_function,
    keeps_baseline,
    loss_function,
    loss_parameters,
    needs_critic,
    needs_greedy,
    needs_groups,
)
from ppo_jax.config.parsing import Check
from ppo_jax.config.stages import check_keep, check_lora, check_optimizer, check_trainable
from ppo_jax.core.distributions import MIN_TEMPERATURE
from ppo_jax.core.importance import CORRECTIONS
from ppo_jax.core.kl import ESTIMATORS, REWARD_ESTIMATORS, REWARD_RULE
from ppo_jax.core.named import parameters, reads_behavior
from ppo_jax.core.sequence_losses import AGGREGATIONS
from ppo_jax.core.shaping import ENSEMBLE_RULES, THRESHOLD

RATIO_RULE = "in (0, 1], or inf"


def check_ppo(settings: Any):
    """Raise a ValueError where the section `ppo` is not usable."""
    check = Check(settings, "ppo")
    check_optimizer(Check(settings.optimizer, "ppo.optimizer"))
    check.that(bool(settings.prompts), "prompts", "the path of a data set")
    check.each("> 0", "num_iterations", "sample_every", "save_every")
    check_keep(check)
    check.each(">= 0", "num_samples", "evaluate_every")
    check.each("> 0", "evaluate_prompts")
    by_evaluation = isinstance(settings.keep, str) and settings.keep.startswith("best:eval/")
    rule = "by another metric, or ppo.evaluate_every at least 1"
    check.that(settings.evaluate_every > 0 or not by_evaluation, "keep", rule)
    check.that(settings.seed >= -1, "seed", ">= 0, or -1 for the run's seed")
    check_trainable(check, "trainable", "value_trainable")
    with_critic = needs_critic(settings.advantage)
    check_lora(check, *(["trainable", "value_trainable"] if with_critic else ["trainable"]))
    check_batches(settings, check)
    check_sampling(settings, check)
    check_old_logprobs(settings, check)
    check_objective(settings, check)
    check_methods(settings, check)
    check_critic(settings, check)
    check_scores(settings, check)
    check_references(settings, check)


def check_batches(settings: Any, check: Check):
    check.each("> 0", "rollout_batch_size", "num_epochs", "num_minibatches")
    check.each("> 0", "num_micro_batches", "samples_per_prompt", "max_rollouts")
    check_max_rollouts(settings, check)
    check.each(">= 0", "logits_chunk")
    most = (2**31 - 1) // (settings.rollout_batch_size * settings.max_rollouts)
    rule = f"at most {most:,}: the state counts responses in int32"
    check.that(settings.num_iterations <= most, "num_iterations", rule)
    parts, samples = (
        settings.num_minibatches * settings.num_micro_batches,
        settings.samples_per_prompt,
    )
    check.multiple("rollout_batch_size", samples, "samples_per_prompt")
    kept = settings.keep_samples
    rule = f"0, or an even number from 2 to below samples_per_prompt ({samples})"
    check.that(kept == 0 or (0 < kept < samples and kept % 2 == 0), "keep_samples", rule)
    check_parts(settings, check, parts, "num_minibatches x num_micro_batches")
    possible = settings.num_micro_batches > 1 or not settings.packing
    rule = "False unless num_micro_batches > 1: it saves whole micro-batches"
    check.that(possible, "packing", rule)
    for field, most, of in (
        ("max_concurrent", settings.rollout_batch_size, "rollout_batch_size"),
        ("min_free_slots", settings.max_concurrent, "max_concurrent"),
    ):
        value = getattr(settings, field)
        rule = f"0, or a multiple of samples_per_prompt ({samples}) up to {of} ({most})"
        holds = 0 <= value <= most and value % samples == 0
        check.that(holds, field, rule if most else f"0 without {of}")


def check_parts(settings: Any, check: Check, parts: int, words: str):
    """The responses that are learned from fall into so many parts."""
    if not settings.keep_samples:
        return check.multiple("rollout_batch_size", parts, words)
    rule = "a number by which rollout_batch_size / samples_per_prompt x keep_samples is a "
    rule += f"multiple of {words} ({parts}); it is {settings.update_batch_size}"
    check.that(settings.update_batch_size % parts == 0, "keep_samples", rule)


def check_max_rollouts(settings: Any, check: Check):
    """Whether groups can be told apart by their scores, and replaced by others."""
    several = settings.max_rollouts > 1
    rule = "1 with samples_per_prompt=1: a group of one has no variance"
    check.that(not several or settings.samples_per_prompt > 1, "max_rollouts", rule)
    rule = "1 with prompt_buckets: the batches of an iteration have one width"
    check.that(not several or settings.prompt_buckets == 1, "max_rollouts", rule)
    rule = f"1 with advantage={settings.advantage!r}, which has greedy responses"
    check.that(not several or not needs_greedy(settings.advantage), "max_rollouts", rule)


def check_sampling(settings: Any, check: Check):
    check.each("> 0", "max_prompt_length", "response_length", "prompt_buckets", "temperature")
    rule = f">= {MIN_TEMPERATURE:g}"
    check.that(settings.temperature >= MIN_TEMPERATURE, "temperature", rule)
    most = settings.max_prompt_length.bit_length()
    rule = f"<= {most}, halves of max_prompt_length"
    check.that(settings.prompt_buckets <= most, "prompt_buckets", rule)
    check.each(">= 0", "top_k")
    check.each("in (0, 1]", "top_p")
    check.each("in [0, 1]", "min_p")
    check.choice("missing_eos", "keep", "penalty", "replace")
    check.choice("score_at", "eos", "last")
    check.each("> 0", "score_clip")
    rule = f"from 0, which is off, to response_length ({settings.response_length})"
    check.that(0 <= settings.overlong_tokens <= settings.response_length, "overlong_tokens", rule)
    check.each(">= 0", "length_penalty")
    free, rule = (
        settings.length_penalty_free,
        f"from 0 to below response_length ({settings.response_length})",
    )
    check.that(0 <= free < settings.response_length, "length_penalty_free", rule)
    check.that(
        free == 0 or settings.length_penalty > 0, "length_penalty_free", "0 without length_penalty"
    )
    check.that(all(settings.stop_tokens), "stop_tokens", "texts of at least one character")


def check_old_logprobs(settings: Any, check: Check):
    check.choice("old_logprobs", "rollout", "recompute")
    low, high = settings.tis_clip_low, settings.tis_clip_high
    check.that(0 <= low <= 1, "tis_clip_low", "in [0, 1]")
    check.that(high >= 1, "tis_clip_high", ">= 1")
    recomputed, rule = settings.old_logprobs == "recompute", '1 unless old_logprobs is "recompute"'
    check.that(recomputed or low == 1, "tis_clip_low", rule)
    check.that(recomputed or high == 1, "tis_clip_high", rule)
    check.choice("importance", *CORRECTIONS)
    rule = "'token' unless tis_clip_low is below tis_clip_high: 1 and 1 is no weight"
    check.that(settings.importance == "token" or low < high, "importance", rule)


def check_objective(settings: Any, check: Check):
    check.each("> 0", "target_kl", "kl_horizon", "value_clip_range", "stop_kl", "max_ref_kl")
    check.each(">= 0", "kl_coef", "vf_coef", "entropy_coef", "value_learning_rate")
    check.each("in [0, 1]", "gamma", "gae_lambda")
    low, high = settings.clip_range, settings.clip_range_high
    check.that(0 < low <= 1 or low == math.inf, "clip_range", RATIO_RULE)
    if low == 1:  # no lower limit, so there is none that the upper one has to be above
        check.each(">= 0", "clip_range_high")
    else:
        rule = f"0 or at least clip_range ({low})"
        check.that(high == 0 or high >= low, "clip_range_high", rule)
    check.choice("kl_estimator", *ESTIMATORS)
    holds = settings.any_kl_estimator or settings.kl_estimator in REWARD_ESTIMATORS
    check.that(holds, "kl_estimator", REWARD_RULE)
    check.choice("kl_control", "fixed", "adaptive")
    weighed = needs_critic(settings.advantage) and not settings.critic_has_optimizer
    rule = "> 0: with value_learning_rate=0 the critic stays as it is"
    if settings.shared_critic:
        rule = "> 0 with shared_critic, whose head learns by it"
    check.that(settings.vf_coef > 0 or not weighed, "vf_coef", rule)
    check_adaptation(settings, check)
    least = 0.2 * settings.rollout_batch_size
    rule = f">= {least:g}, a fifth of rollout_batch_size: the coefficient changes sign below"
    unread = settings.kl_control == "fixed" and settings.kl_horizon == type(settings).kl_horizon
    check.that(unread or settings.kl_horizon >= least, "kl_horizon", rule)


def check_adaptation(settings: Any, check: Check):
    check.each(">= 0", "target_entropy", "penalty_target_kl", "ref_reset_every")
    check.each("in [0, 1]", "ref_ema_decay")
    once = settings.ref_ema_decay == 1 or settings.ref_reset_every == 0
    check.that(once, "ref_reset_every", "0 unless ref_ema_decay is 1: one or the other")
    rule = "'fixed' with a reference that moves: the KL from it falls whenever it does"
    fixed = settings.kl_control == "fixed" or not settings.reference_moves
    check.that(fixed, "kl_control", rule)
    rule = "1 with trainable='lora': the mean of two adapters is not that of their weights"
    whole = settings.trainable != "lora" or settings.ref_ema_decay == 1
    check.that(whole, "ref_ema_decay", rule)
    unread = settings.entropy_coef_step == type(settings).entropy_coef_step
    rule = f"{type(settings).entropy_coef_step:g} without target_entropy"
    check.that(settings.target_entropy > 0 or unread, "entropy_coef_step", rule)
    check.each("> 0", "entropy_coef_step")


def check_methods(settings: Any, check: Check):
    """What the estimator and the loss do not take is left as it is."""
    advantage, loss = (
        parameters(advantage_function(settings.advantage)),
        loss_parameters(settings.loss),
    )
    if needs_groups(settings.advantage):
        rule = f"at least 2 with advantage={settings.advantage!r}"
        check.that(settings.samples_per_prompt >= 2, "samples_per_prompt", rule)
    if "gamma" not in advantage:
        rule = f"1 with advantage={settings.advantage!r}, which compares whole responses"
        check.that(settings.gamma == 1, "gamma", rule)
    of_losses = ("dual_clip", "penalty_coef", "divergence_limit", "behavior_weight_limit")
    of_losses += ("covariance_fraction", "covariance_low", "covariance_high")
    of_losses += ("clip_range", "clip_range_high")
    for field in of_losses:
        default = f"{getattr(type(settings), field):g}"
        rule = f"{default} unless the loss takes it, which {settings.loss!r} does not"
        unread = getattr(settings, field) == getattr(type(settings), field)
        no_clip = field == "clip_range" and settings.clip_range == math.inf
        check.that(field in loss or unread or no_clip, field, rule)
    rule = f"0 unless the loss takes a penalty_coef, which {settings.loss!r} does not"
    adapts = settings.penalty_target_kl > 0
    check.that("penalty_coef" in loss or not adapts, "penalty_target_kl", rule)
    rule = "> 0 with penalty_target_kl: 0 doubled is 0"
    check.that(settings.penalty_coef > 0 or not adapts, "penalty_coef", rule)
    rule = f"False with advantage={settings.advantage!r}: greedy scores are not scaled"
    scaled = settings.whiten_rewards and needs_greedy(settings.advantage)
    check.that(not scaled, "whiten_rewards", rule)
    unread = settings.baseline_decay == type(settings).baseline_decay
    rule = f"{type(settings).baseline_decay:g} unless the advantage takes a baseline"
    check.that(keeps_baseline(settings.advantage) or unread, "baseline_decay", rule)
    check.each("in [0, 1]", "baseline_decay")
    check.that(settings.dual_clip > 1, "dual_clip", "> 1")
    check.each("> 0", "behavior_weight_limit")
    check.each("in (0, 1]", "covariance_fraction")
    check.each("in [0, 1]", "divergence_limit")
    rule = f"above covariance_low ({settings.covariance_low:g})"
    check.that(settings.covariance_high > settings.covariance_low, "covariance_high", rule)
    if reads_behavior(loss_function(settings.loss)):
        rule = f"'recompute' with loss={settings.loss!r}: otherwise its two policies are one"
        check.that(settings.old_logprobs == "recompute", "old_logprobs", rule)
        rule = f"1 with loss={settings.loss!r}, which has the weights itself"
        check.that(settings.tis_clip_low == 1, "tis_clip_low", rule)
        check.that(settings.tis_clip_high == 1, "tis_clip_high", rule)
    check.each(">= 0", "penalty_coef", "kl_loss_coef")
    check.choice("aggregation", *AGGREGATIONS)
    rule = f"'token_mean' with loss={settings.loss!r}, which takes no weights"
    check.that("weights" in loss or settings.aggregation == "token_mean", "aggregation", rule)


def check_critic(settings: Any, check: Check):
    check.each("> 0", "value_updates")
    check.each(">= 0", "critic_warmup", "value_num_minibatches", "gae_lambda_alpha")
    check.each(">= 0", "critic_warmup_tolerance")
    possible = settings.critic_warmup > 0 or settings.critic_warmup_tolerance == 0
    check.that(possible, "critic_warmup_tolerance", "0 without critic_warmup")
    rule = f"{type(settings).gae_lambda:g} with gae_lambda_alpha, which is in its place"
    unread = settings.gae_lambda == type(settings).gae_lambda
    check.that(unread or settings.gae_lambda_alpha == 0, "gae_lambda", rule)
    own = settings.value_gae_lambda
    check.that(own == -1 or 0 <= own <= 1, "value_gae_lambda", "in [0, 1], or -1")
    steps = (
        settings.value_num_minibatches or settings.num_minibatches
    ) * settings.num_micro_batches
    check_parts(settings, check, steps, "value_num_minibatches x num_micro_batches")
    optimizer = settings.value_optimizer.over(settings.optimizer, settings.value_learning_rate)
    check_optimizer(Check(optimizer, "ppo.value_optimizer"))
    if settings.critic_has_optimizer:
        rule = f"{type(settings).vf_coef:g}: a critic with an optimizer of its own has no weight"
        check.that(settings.vf_coef == type(settings).vf_coef, "vf_coef", rule)
    check_bins(settings, check)
    check_several(settings, check)
    check_shared(settings, check)
    if needs_critic(settings.advantage):
        return
    defaults = {"critic_warmup": 0, "value_updates": 1, "value_num_minibatches": 0}
    defaults |= {"gae_lambda_alpha": 0, "value_gae_lambda": -1, "value_bins": 0}
    defaults |= {"num_critics": 1, "whiten_advantages": True, "shared_critic": False}
    for field, default in defaults.items():
        rule = f"{default} with advantage={settings.advantage!r}, which has no critic"
        check.that(getattr(settings, field) == default, field, rule)
    rule = f"left out with advantage={settings.advantage!r}, which has no critic"
    check.that(not settings.critic_has_optimizer, "value_optimizer", rule)


def check_shared(settings: Any, check: Check):
    """A critic on the policy's body has no body, no start and no steps of its own."""
    if not settings.shared_critic:
        return
    words = "with shared_critic, which is on the policy's body"
    check.that(settings.critic_init_from == "", "critic_init_from", f"'' {words}")
    check.that(settings.value_trainable == "all", "value_trainable", f"'all' {words}")
    for field, default in (("value_updates", 1), ("value_num_minibatches", 0)):
        check.that(getattr(settings, field) == default, field, f"{default} {words}")
    own = not settings.critic_has_optimizer
    check.that(own, "value_optimizer", f"left out {words}: one optimizer takes its steps")


def check_bins(settings: Any, check: Check):
    rule = "at least 2, or 0, which is a critic without bins"
    check.that(settings.value_bins == 0 or settings.value_bins >= 2, "value_bins", rule)
    if not settings.value_bins:
        check.that(settings.value_range == (), "value_range", "() without value_bins")
        return
    ends, rule = settings.value_range, "two finite numbers with value_bins, the lower one first"
    rises = len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf
    check.that(rises, "value_range", rule)
    default = type(settings).value_clip_range
    rule = f"{default:g} with value_bins: the loss of a critic with bins has no clip"
    check.that(settings.value_clip_range == default, "value_clip_range", rule)


def check_several(settings: Any, check: Check):
    check.each("> 0", "num_critics")
    fractions = ("agreed_fraction", "disputed_fraction")
    for field in fractions:
        check.that(0 <= getattr(settings, field) < 1, field, "in [0, 1)")
    if settings.num_critics == 1:
        rule = "0 with one critic, which agrees with itself"
        for field in fractions:
            check.that(getattr(settings, field) == 0, field, rule)
        return
    rule = "0 without entropy_coef or target_entropy: there is no entropy bonus to leave out"
    has_bonus = settings.entropy_coef > 0 or settings.target_entropy > 0
    check.that(has_bonus or settings.disputed_fraction == 0, "disputed_fraction", rule)
    check.that(not settings.value_bins, "value_bins", "0 with several critics")
    words = "num_critics x samples_per_prompt"
    check.multiple("rollout_batch_size", settings.num_critics * settings.samples_per_prompt, words)


def check_scores(settings: Any, check: Check):
    """Scores come from a model or a function, and the critic from what there is."""
    check.each("> 0", "reward_timeout_s")
    sources = {name: getattr(settings, name) for name in ("reward_model", "reward_function")}
    if settings.reward_functions:
        sources["reward_functions"] = settings.reward_functions
    if sum(map(bool, sources.values())) != 1:
        got = " and ".join(f"{name}={value!r}" for name, value in sources.items())
        raise ValueError(f"ppo needs either a reward_model or a reward_function, got {got}")
    once = len(set(settings.reward_functions)) == len(settings.reward_functions)
    check.that(once and all(settings.reward_functions), "reward_functions", "names, each once")
    count = len(settings.reward_functions)
    rule = f"() or {count} numbers, one for each of reward_functions"
    check.that(len(settings.reward_weights) in (0, count), "reward_weights", rule)
    check_ensemble(settings, check)
    rule = "a stage before ppo, or of another run: this one has no critic yet"
    own = re.fullmatch(r"ppo(@\w+)?", settings.critic_init_from)
    check.that(own is None, "critic_init_from", rule)
    possible = bool(settings.reward_model) or settings.critic_init_from != "reward_model"
    rule = "'policy', 'scratch', '' or a model with a reward_function"
    check.that(possible, "critic_init_from", rule)
    whole = settings.critic_init_from != "scratch" or settings.value_trainable == "all"
    check.that(whole, "value_trainable", "'all' with critic_init_from='scratch'")
    if not needs_critic(settings.advantage):
        rule = f"'' with advantage={settings.advantage!r}, which has no critic"
        check.that(not settings.critic_init_from, "critic_init_from", rule)


def check_references(settings: Any, check: Check):
    """Responses of the reference, to which those of the policy are compared."""
    check.each(">= 0", "reference_responses")
    count = settings.reference_responses
    if not count:
        return
    rule = "1 with reference_responses, which are to the prompts of one rollout"
    check.that(settings.max_rollouts == 1, "max_rollouts", rule)
    rule = "with reference_responses, whose scores are from 0 to 1 in any case"
    check.that(not settings.score_normalization, "score_normalization", f"False {rule}")
    check.that(settings.score_clip == math.inf, "score_clip", f"inf {rule}")
    for field in ("max_concurrent", "min_free_slots"):
        rule = f"a multiple of reference_responses ({count}), which are decoded as many at a time"
        check.that(getattr(settings, field) % count == 0, field, rule)


def check_ensemble(settings: Any, check: Check):
    """Several reward models, and a rule that is read."""
    others, rule = settings.other_reward_models, settings.reward_rule
    names = (settings.reward_model, *others)
    distinct = len(set(names)) == len(names) and all(others)
    check.that(distinct, "other_reward_models", "names, each once and none that of reward_model")
    check.that(
        not others or bool(settings.reward_model),
        "other_reward_models",
        "() without a reward_model",
    )
    check.choice("reward_rule", *ENSEMBLE_RULES, AVERAGE, THRESHOLD)
    check.that(bool(others) or rule == "mean", "reward_rule", "'mean' without other_reward_models")
    check.each(">= 0", "reward_rule_coef")
    reads = rule.startswith("mean_minus")
    text = f"1 with reward_rule={rule!r}"
    check.that(reads or settings.reward_rule_coef == 1, "reward_rule_coef", text)
    text = f"one name with reward_rule={THRESHOLD!r}, that of the model of safety"
    check.that(rule != THRESHOLD or len(others) == 1, "other_reward_models", text)
    unread = settings.reward_rule_threshold == type(settings).reward_rule_threshold
    text = f"{type(settings).reward_rule_threshold:g} with reward_rule={rule!r}"
    check.that(rule == THRESHOLD or unread, "reward_rule_threshold", text)
