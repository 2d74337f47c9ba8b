"""Responses from a policy: the plain loop of `decode`, or `continuous_batching`.

Dimension key: N responses, P prompt tokens, T response tokens.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import known
from ppo_jax.core.distributions import check_temperature
from ppo_jax.core.network import Network
from ppo_jax.core.types import Params, Prompts, Rollout
from ppo_jax.rollout.continuous_batching import decode_with_refills
from ppo_jax.rollout.decode import Kept, Policy, decode_all
from ppo_jax.rollout.sampling import Sampling


def rollout(
    policy: Network,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: Sampling,
    temperature: jax.Array | float = 1.0,
    rows: jax.Array | None = None,
    trunk: Network | None = None,
    trunk_params: Params | None = None,
) -> Rollout:
    """Sample N responses, `samples_per_prompt` to each prompt, as one program.

    Each token has a key of its own, fold_in(fold_in(key, row), t), so a response depends neither
    on the batch that it was sampled in, nor on `max_concurrent`, nor on how the batch is sharded.
    The program ends when every response has.

    With `max_concurrent` below N the rows are those of `continuous_batching`: a finished response
    frees its row for the next prompt. A row costs the same whether its response is active or has
    ended: few rows waste little work, many make better use of the hardware at each step.

    Args:
        policy: returns logits; above `trunk` when there is one.
        params: the policy's parameters.
        prompts: N / samples_per_prompt prompts, padded on the left (checked outside of a traced
            program, where the mask is known). Responses to the same prompt follow each other.
        key: consumed.
        sampling: length, stop tokens, filters, concurrency.
        temperature: one number, see `sample`; 0 is greedy, and then `logprobs` are those at 1.
        rows: [N] int, the row numbers folded into the key; 0 .. N - 1 by default.
        trunk: frozen lower layers, run once per token; their hidden states are kept, so that
            other networks on the same trunk need not run it again.
        trunk_params: the trunk's parameters.

    Returns:
        The rollout. `logprobs` are over the full vocabulary, before the filters.

    Raises:
        ValueError: max_concurrent or min_free_slots do not fit, or need a network with `refill`;
            there is no prompt, or one that is padded on the right; the temperature.
    """
    chex.assert_rank([prompts.tokens, prompts.mask], 2)
    chex.assert_equal_shape([prompts.tokens, prompts.mask])
    chex.assert_type([prompts.tokens, prompts.mask], [int, bool])
    check_prompts(prompts)
    check_temperature(temperature)
    num_rows = prompts.tokens.shape[0] * sampling.samples_per_prompt
    concurrent = min(sampling.max_concurrent or num_rows, num_rows)
    check_concurrency(sampling, concurrent, num_rows, (trunk, policy))
    rows = jnp.arange(num_rows, dtype=jnp.int32) if rows is None else rows
    chex.assert_shape(rows, (num_rows,))
    chex.assert_type(rows, int)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    decode = decode_all if concurrent == num_rows else decode_with_refills
    bound = Policy(policy, params, trunk, trunk_params)
    read = Prompts(tokens=prompts.tokens, mask=prompts.mask)
    responses, of_prompts = decode(bound, read, keys, sampling, temperature)

    def of_rows(x):
        return jnp.repeat(x, sampling.samples_per_prompt, axis=0, total_repeat_length=num_rows)

    def whole(prompts, responses):
        return jnp.concatenate([of_rows(prompts), responses], axis=1)

    kept = jax.tree.map(whole, of_prompts, without_last(responses.kept, responses.mask))
    return Rollout(
        prompt_tokens=of_rows(prompts.tokens),
        prompt_mask=of_rows(prompts.mask),
        response_tokens=responses.tokens,
        response_mask=responses.mask,
        logprobs=responses.logprobs,
        has_eos=responses.stopped,
        hidden_states=kept.hidden_states,
        is_safety=None if prompts.is_safety is None else of_rows(prompts.is_safety),
        experts=kept.experts,
    )


def without_last(kept: Kept, mask: jax.Array) -> Kept:
    """What is kept of responses [B, T, ...], with no experts of a token that none follows: it may
    not have been through the network."""
    if kept.experts is None:
        return kept
    goes_on = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None, None]
    none = jnp.iinfo(kept.experts.dtype).max
    return kept._replace(experts=jnp.where(goes_on, kept.experts, none))


def check_prompts(prompts: Prompts) -> None:
    """Raise a ValueError where there is none, or one is known not to end with a token."""
    if not prompts.tokens.size:
        raise ValueError(f"there must be prompts of 1 token or more, got {prompts.tokens.shape}")
    mask = known(prompts.mask)
    if mask is not None and not mask[:, -1].all():
        row = (~mask[:, -1]).nonzero()[0][0]
        raise ValueError(f"prompts must be padded on the left, got row {row} with padding last")


def check_concurrency(sampling: Sampling, concurrent: int, num_rows: int, networks: tuple) -> None:
    """Raise a ValueError where `max_concurrent` rows cannot decode them all."""
    samples, group = sampling.samples_per_prompt, sampling.group(concurrent)
    if concurrent < num_rows and group > concurrent:
        raise ValueError(
            f"min_free_slots must be at most {concurrent} and a multiple of samples_per_prompt "
            f"({samples}), got {group}"
        )
    if concurrent % samples:
        raise ValueError(
            f"max_concurrent must be a multiple of samples_per_prompt ({samples}), got {concurrent}"
        )
    without = [n for n in networks if n is not None and n.refill is None]
    if without and (concurrent < num_rows or samples > 1):
        raise ValueError(
            "max_concurrent and samples_per_prompt need a network with `refill`, this one has none"
        )
