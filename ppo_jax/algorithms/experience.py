"""From prompts to experience: responses, their scores, rewards, advantages.

Dimension key: B responses, P prompt tokens, T response tokens, L = P + T.
"""

import dataclasses
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from ppo_jax.algorithms.advantages import baselines, estimate_advantages
from ppo_jax.algorithms.critics import (
    critic_metrics,
    take_critic,
    values_from,
)
from ppo_jax.algorithms.ensembles import RewardEnsemble, combine_scores, member_scores
from ppo_jax.algorithms.options import PPONetworks, PPOOptions, Sampler
from ppo_jax.algorithms.passes import (
    FirstPass,
    Outputs,
    critic_outputs,
    forward,
    without_outputs,
)
from ppo_jax.algorithms.scores import moment_metrics, scores_of_references, shape_scores
from ppo_jax.algorithms.selection import extreme_responses, keep_responses
from ppo_jax.core.advantages import whiten
from ppo_jax.core.critics import disputed_states, ensemble_values, mask_agreed_advantages
from ppo_jax.core.importance import CORRECTIONS, importance_weights
from ppo_jax.core.kl import kl_estimate
from ppo_jax.core.masking import last_token_index, masked_mean, masked_moments
from ppo_jax.core.named import (
    function_name,
    reads_behavior,
    reads_greedy,
    reads_values,
)
from ppo_jax.core.network import Network, last_outputs, merge_params, shared_prompt
from ppo_jax.core.renamed import renamed
from ppo_jax.core.rewards import token_rewards, token_scores
from ppo_jax.core.shaping import score_deviation
from ppo_jax.core.types import (
    Experience,
    FrozenParams,
    Hyperparameters,
    Params,
    PPOState,
    Prompts,
    Rollout,
)
from ppo_jax.rollout.decode import response_statistics
from ppo_jax.rollout.rollout import rollout


@renamed(recipe="options")
def sample_responses(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> Rollout:
    """The rollout of one iteration with the current policy. The key is consumed."""
    sampler = networks.sampler or Sampler(networks.policy, networks.trunk, reshard=lambda x: x)
    return rollout(
        sampler.policy,
        sampler.reshard(merge_params(frozen.policy, state.policy_params)),
        prompts,
        key,
        sampling=options.sampling,
        temperature=hyperparameters.temperature,
        trunk=sampler.trunk,
        trunk_params=None if frozen.trunk is None else sampler.reshard(frozen.trunk),
    )


def response_scores(
    rollout: Rollout,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    eos_id: int | None = None,
    samples_per_prompt: int = 1,
) -> jax.Array:
    """The reward model's score of each response, [B] float32, read at its last token; of several
    models that of their rule.

    Args:
        rollout: B responses.
        frozen: holds the reward model, and the trunk if there is one.
        networks: the reward model is called; with `eos_id` also the trunk that it is on.
        eos_id: the token with which the reward model's training texts end. It is put behind each
            response that has stopped at another one, and the score is read there. None puts none.
        samples_per_prompt: so many responses after another have one prompt; see `response_outputs`.

    Raises:
        ValueError: there is no reward model.
    """
    how = dict(eos_id=eos_id, samples_per_prompt=samples_per_prompt)
    return scores_and_metrics(rollout, frozen=frozen, networks=networks, **how)[0]


def scores_and_metrics(
    rollout: Rollout,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    eos_id: int | None = None,
    samples_per_prompt: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(`response_scores`, metrics of each response, [B], by several reward models; none of one)."""
    if networks.reward is None:
        raise ValueError("response_scores needs a reward model in networks.reward, got None")
    ended = rollout if eos_id is None else with_eos(rollout, eos_id)
    groups = dict(prompt_length=rollout.prompt_mask.shape[1], samples=samples_per_prompt)
    inputs = ended.hidden_states if networks.reward_on_trunk else ended.tokens
    if inputs is None and networks.trunk is not None:  # of an EOS that was not sampled
        inputs = hidden_states(networks.trunk, frozen.trunk, ended, groups)
    if isinstance(networks.reward, RewardEnsemble):
        each = member_scores(networks.reward, frozen.reward, inputs, ended.mask, groups)
        return combine_scores(networks.reward, each, rollout.is_safety)
    shared = shared_prompt(networks.reward, len(ended.mask), **groups)
    return last_outputs(networks.reward, frozen.reward, inputs, ended.mask, shared), {}


def hidden_states(
    trunk: Network, params: Params, rollout: Rollout, groups: dict[str, int]
) -> jax.Array:
    """[B, L, D], those of a rollout; `groups`: see `shared_prompt`."""
    tokens, mask = rollout.tokens, rollout.mask
    if (shared := shared_prompt(trunk, len(mask), **groups)) is None:
        return trunk.apply(params, tokens, mask)
    return trunk.apply(params, shared.join(tokens), shared.join(mask), shared_prompt=shared)


def with_eos(rollout: Rollout, eos_id: int) -> Rollout:
    """The rollout with one more column, for an EOS behind each response that has stopped at another
    token; those that were cut off and those that end with EOS stay as they are.

    Log-probs are 0 there; there are no hidden states, and no experts.
    """

    def wider(x):
        return jnp.pad(x, ((0, 0), (0, 1)))

    last = last_token_index(rollout.response_mask)[:, None]
    differs = jnp.take_along_axis(rollout.response_tokens, last, axis=1) != eos_id
    columns = jnp.arange(rollout.response_mask.shape[1] + 1, dtype=last.dtype)[None]
    is_new = (columns == last + 1) & differs & rollout.has_eos[:, None]
    return dataclasses.replace(
        rollout,
        response_tokens=jnp.where(is_new, eos_id, wider(rollout.response_tokens)),
        response_mask=wider(rollout.response_mask) | is_new,
        logprobs=wider(rollout.logprobs),
        hidden_states=None,
        experts=None,
    )


@renamed(recipe="options")
def make_experience(
    rollout: Rollout,
    scores: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    greedy: tuple[Rollout, jax.Array] | None = None,
    references: tuple[Rollout, jax.Array] | None = None,
    ref_logprobs: jax.Array | None = None,
    first: Mapping[str, FirstPass] | None = None,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Rewards, advantages and returns of a rollout.

    With `options.keep_samples` it is that of the kept responses alone. The estimator of advantages
    still sees all of them, so that one that compares the samples of a prompt, or whitens by itself,
    does so over all; those of a critic are then whitened over the tokens of those that are kept.

    Args:
        rollout: B responses.
        scores: [B] float, one a response, or [B, T] float, one a token.
        state: holds the critic, if there is one, the coefficient of adaptive KL control, and the
            moments of all scores with these among them, where they are normalized.
        hyperparameters: the numbers of rewards and advantages.
        frozen: holds the reference.
        networks: policy and critic are called.
        options: what shapes the program.
        greedy: a greedy response to each prompt, and their scores, as those of the rollout are,
            where the advantages need them.
        references: responses of the reference to each prompt, and their scores, where the
            options have `reference_responses`, see `scores_of_references`.
        ref_logprobs: [B, T] float, of the reference, see `reference_logprobs`; None computes them.
        first: forward passes of the update, see `first_passes`, whose outputs are taken; what is
            in none of them is computed.

    Returns:
        (experience, metrics).

    Raises:
        ValueError: the advantages need a critic and networks or state have none, or the other way
            round; or greedy responses, or those of the reference, likewise.
    """
    check_critic(options, networks, state, hyperparameters)
    if reads_greedy(options.advantage) != (greedy is not None):
        rule = "needs no greedy responses" if greedy else "needs greedy responses"
        raise ValueError(f"{function_name(options.advantage)} {rule}")
    chex.assert_rank(scores, {1, 2})
    chex.assert_shape(scores, rollout.response_mask.shape[: scores.ndim])
    mask, numbers = rollout.response_mask, hyperparameters
    parts = dict(frozen=frozen, networks=networks)
    if ref_logprobs is None:
        samples = options.sampling.samples_per_prompt
        how = dict(samples_per_prompt=samples, **parts)
        ref_logprobs = reference_logprobs(rollout, numbers, **how)
    inputs = without_outputs(rollout, networks, options)
    outputs = scoring_outputs(inputs, state, numbers, first=first, options=options, **parts)
    weights, weight_metrics, sampled_logprobs = jnp.float32(1.0), {}, rollout.logprobs
    if options.old_logprobs == "recompute":
        logprobs = outputs.logprobs
        rollout, weights, weight_metrics = with_old_logprobs(rollout, logprobs, numbers, options)
    count = options.reference_responses
    against, reference_metrics = scores_of_references(
        references, scores, state, numbers, num_references=count
    )
    given = (rollout, scores, ref_logprobs, state, numbers, options)
    rewards, metrics = response_rewards(*given, reference_scores=against)
    if options.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    old_values = values = stds = None
    if networks.value is not None:
        old_values, values, stds = critic_values(outputs.values, inputs, numbers)
    kept, learned = None, mask
    if options.keep_samples:
        groups = dict(group_size=options.sampling.samples_per_prompt)
        kept = extreme_responses(scores, mask, keep_samples=options.keep_samples, **groups)
        learned = mask & kept[:, None]
    given, baseline_metrics = baselines(rewards, greedy, state, numbers, options, against)
    advantages, returns = estimate_advantages(
        rewards, values, mask, numbers, options, kept=kept, **given
    )
    metrics |= weight_metrics | baseline_metrics | reference_metrics
    disputed = None
    if stds is not None:
        advantages, disputed, found = where_critics_differ(advantages, stds, learned, numbers)
        metrics |= found
    if values is not None and returns is not None:
        metrics |= critic_metrics(values, returns, learned)
    experience = dataclasses.replace(
        inputs,
        logprobs=rollout.logprobs,
        values=old_values,
        advantages=advantages * weights,
        returns=returns,
        ref_logprobs=None if numbers.kl_loss_coef is None else jnp.where(mask, ref_logprobs, 0.0),
        behavior_logprobs=sampled_logprobs if reads_behavior(options.loss) else None,
        disputed_mask=disputed,
    )
    if kept is not None:
        count = len(mask) // options.sampling.samples_per_prompt * options.keep_samples
        experience = keep_responses(experience, kept, count)
    return experience, metrics


def with_old_logprobs(
    rollout: Rollout, logprobs: jax.Array, hyperparameters: Hyperparameters, options: PPOOptions
) -> tuple[Rollout, jax.Array, dict[str, jax.Array]]:
    """(the rollout with log-probs [B, T] that were recomputed, the importance weights of its
    tokens, their metrics)."""
    mask, numbers = rollout.response_mask, hyperparameters
    limits = dict(low=numbers.tis_clip_low, high=numbers.tis_clip_high)
    how = limits | CORRECTIONS[options.importance]
    weights, metrics = importance_weights(logprobs, rollout.logprobs, mask, **how)
    logprobs = jnp.where(mask, logprobs, 0.0)
    return dataclasses.replace(rollout, logprobs=logprobs), weights, metrics


def where_critics_differ(
    advantages: jax.Array, stds: jax.Array, learned: jax.Array, hyperparameters: Hyperparameters
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """What the standard deviation [B, T] between several critics changes.

    Returns:
        (advantages, 0 where they agree most; the tokens without an entropy bonus [B, T] bool, or
        None; metrics).
    """
    disputed, metrics = None, {"value/disagreement": masked_mean(stds, learned)}
    if (fraction := hyperparameters.agreed_fraction) is not None:
        advantages = mask_agreed_advantages(advantages, stds, learned, fraction=fraction)
    if (fraction := hyperparameters.disputed_fraction) is not None:
        disputed = disputed_states(stds, learned, fraction=fraction)
        share = masked_mean(disputed.astype(jnp.float32), learned)
        metrics["value/disputed_fraction"] = share
    return advantages, disputed, metrics


def check_critic(
    options: PPOOptions, networks: PPONetworks, state: PPOState, hyperparameters: Hyperparameters
) -> None:
    """Networks and state have a critic where the advantages need one, and nowhere else; several
    have values that may agree, and no bins."""
    if options.num_critics > 1 and hyperparameters.value_range is not None:
        raise ValueError("several critics have no bins: value_range must be None")
    if options.num_critics == 1 and hyperparameters.agreed_fraction is not None:
        raise ValueError("one critic agrees with itself: agreed_fraction must be None")
    if options.num_critics == 1 and hyperparameters.disputed_fraction is not None:
        raise ValueError("one critic agrees with itself: disputed_fraction must be None")
    needed, name = reads_values(options.advantage), function_name(options.advantage)
    rule = "needs a critic" if needed else "needs no critic"
    if needed != (networks.value is not None):
        raise ValueError(f"{name} {rule}: see networks.value")
    if needed != (state.value_params is not None):
        raise ValueError(f"{name} {rule}: see state.value_params")


def scoring_outputs(
    inputs: Experience,
    state: PPOState,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    first: Mapping[str, FirstPass] | None = None,
) -> Outputs:
    """What an experience needs of the networks that are trained, by the parameters of the state:
    the critic's outputs, and the policy's where log-probs are recomputed.

    Args:
        inputs: see `without_outputs`.
        state: its parameters are read.
        hyperparameters: the temperature is read.
        frozen: the untrained leaves.
        networks: policy and critic are called.
        options: `old_logprobs` is read.
        first: forward passes whose outputs are taken in place of computing them.
    """
    outputs = Outputs()
    for one in (first or {}).values():
        outputs = outputs.filled_by(one.outputs)
    trained = {"policy": state.policy_params, "value": state.value_params}
    given, parts = (inputs, hyperparameters), dict(frozen=frozen, networks=networks)
    parts |= dict(samples_per_prompt=options.sampling.samples_per_prompt)
    needs_values = networks.value is not None and outputs.values is None
    if options.old_logprobs == "recompute" and outputs.logprobs is None:
        if not needs_values:
            trained = {"policy": state.policy_params}
        return outputs.filled_by(forward(trained, *given, **parts))
    if needs_values:
        outputs = outputs._replace(values=critic_outputs(trained, inputs, **parts))
    return outputs


def critic_values(
    outputs: jax.Array, inputs: Experience, hyperparameters: Hyperparameters
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(the values that the critic's clip starts from; those that advantages are made of; their
    standard deviation over several critics, or None), [B, T] float32 each, 0 where masked.

    Args:
        outputs: see `critic_outputs`.
        inputs: mask, and which of several critics learns a token.
        hyperparameters: `value_range` is read.
    """
    mask = inputs.response_mask
    if inputs.critics is None:
        values = jnp.where(mask, values_from(outputs, hyperparameters), 0.0)
        return values, values, None
    every = jnp.where(mask, outputs, 0.0)
    return take_critic(every, inputs.critics), *ensemble_values(every)


def reference_logprobs(
    rollout: Rollout,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    samples_per_prompt: int = 1,
) -> jax.Array:
    """Log-probs of the response tokens by the reference, see `policy_logprobs`."""
    inputs = rollout.tokens if networks.trunk is None else rollout.hidden_states
    how = dict(policy_inputs=inputs, frozen=frozen, networks=networks)
    how |= dict(samples_per_prompt=samples_per_prompt)
    return policy_logprobs(rollout, frozen.ref_policy, hyperparameters, **how)


def policy_logprobs(
    rollout: Rollout,
    params: Params,
    hyperparameters: Hyperparameters,
    *,
    policy_inputs: jax.Array,
    frozen: FrozenParams,
    networks: PPONetworks,
    samples_per_prompt: int = 1,
) -> jax.Array:
    """Log-probs of the response tokens as the update computes them, [B, T] float32, undefined
    where masked; `params` are the trained leaves, of the policy or of the reference."""
    logprobs, _ = response_statistics(
        networks.policy,
        merge_params(frozen.policy, params),
        policy_inputs,
        rollout.mask,
        rollout.response_tokens,
        temperature=hyperparameters.temperature,
        samples_per_prompt=samples_per_prompt,
    )
    return logprobs


def response_rewards(
    rollout: Rollout,
    scores: jax.Array,
    ref_logprobs: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    options: PPOOptions,
    *,
    reference_scores: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The reward of each token: its score, or that of the response at the last one, minus the KL
    penalty at each.

    Of scores [B, T] the shaping and the metrics `reward/...score...` see the sum over a response.
    What it changes is changed at the last token; what the missing-EOS rule replaces is 0 before,
    and where scores are normalized those of tokens are divided by the same deviation.
    `reference_scores`: see `shape_scores`.

    Returns:
        (rewards [B, T] float32, 0 where masked; metrics of scores, KL and responses).
    """
    mask, of_tokens = rollout.response_mask, None
    if scores.ndim == 2:
        of_tokens = token_scores(scores, mask)
        scores = of_tokens.sum(axis=1)
    how = dict(missing_eos=options.missing_eos, reference_scores=reference_scores)
    adjusted = shape_scores(scores, mask, rollout.has_eos, state, hyperparameters, **how)
    kl_coef = hyperparameters.kl_coef if options.kl_control == "fixed" else state.kl_coef
    credited = adjusted
    if of_tokens is not None:
        if state.score_moments is not None:
            of_tokens = of_tokens / score_deviation(state.score_moments)
        if options.missing_eos == "replace":
            of_tokens = jnp.where(rollout.has_eos[:, None], of_tokens, 0.0)
        credited = of_tokens + token_scores(adjusted - of_tokens.sum(axis=1), mask)
    rewards = token_rewards(
        credited,
        rollout.logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        estimator=options.kl_estimator,
    )
    kl = jnp.where(mask, kl_estimate(rollout.logprobs, ref_logprobs, estimator="k1"), 0.0)
    metrics = {
        "reward/score_mean": scores.mean(),
        "reward/score_std": jnp.sqrt(masked_moments(scores, jnp.ones(scores.shape, bool))[1]),
        "reward/adjusted_score_mean": adjusted.mean(),
        "reward/kl_penalty": adjusted.mean() - rewards.sum(axis=1).mean(),
        "kl/ref": kl.sum(axis=1).mean(),
        "kl/coef": jnp.asarray(kl_coef, jnp.float32),
        "response/length": mask.sum(axis=1).astype(jnp.float32).mean(),
        "response/eos_fraction": rollout.has_eos.astype(jnp.float32).mean(),
    }
    return rewards, metrics | moment_metrics(state)
