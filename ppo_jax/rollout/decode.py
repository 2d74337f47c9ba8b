"""Sampling responses with a KV cache, and what is read off them afterwards.

Dimension key: N responses, B sequences, P prompt tokens, T response tokens, L = P + T, D model,
V vocabulary.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.distributions import token_statistics
from ppo_jax.core.network import Network
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import Params, Prompts, Rollout
from ppo_jax.rollout.continuous_batching import Engine
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
    on the batch it was sampled in, nor on the slots, nor on how the batch lies on devices. The
    program ends when every response has.

    With fewer slots than responses, prompts wait until G slots are free and enter them together:
    one prefill of G prompts. A slot costs the same whether its response is under way or has ended:
    few slots have little idle work, many make better use of the hardware for each step.

    Args:
        policy: the network that gives logits; above `trunk` when there is one.
        params: the policy's parameters.
        prompts: N / samples_per_prompt prompts, padded on the left. Responses to the same prompt
            follow each other.
        key: consumed.
        sampling: length, stop tokens, filters, slots.
        temperature: of the sampling; 0 is greedy, and then `logprobs` are those at 1.
        rows: [N] int, the numbers that tell the rows apart; 0 .. N - 1 by default.
        trunk: frozen lower layers, run once per token; their hidden states are kept, so that
            other networks on the same trunk need not run it again.
        trunk_params: the trunk's parameters.

    Returns:
        The rollout. `logprobs` are over the full vocabulary, before the filters.

    Raises:
        ValueError: max_concurrent or min_free_slots do not fit, or need a network with `refill`.
    """
    chex.assert_rank([prompts.tokens, prompts.mask], 2)
    chex.assert_equal_shape([prompts.tokens, prompts.mask])
    chex.assert_type([prompts.tokens, prompts.mask], [int, bool])
    num_rows = prompts.tokens.shape[0] * sampling.samples_per_prompt
    num_slots = min(sampling.max_concurrent or num_rows, num_rows)
    check_slots(sampling, num_slots, num_rows, (trunk, policy))
    rows = jnp.arange(num_rows) if rows is None else rows
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    engine = Engine(
        networks=(trunk, policy),
        params=(trunk_params, params),
        prompts=prompts,
        keys=keys,
        sampling=sampling,
        temperature=temperature,
    )
    slots, hidden = engine.begin(num_slots)
    if num_slots == num_rows:
        slots = jax.lax.while_loop(lambda s: s.alive.any(), engine.advance, slots)
        ended = slots
    else:
        ended, hidden = engine.serve(slots, hidden, sampling.group(num_slots))

    def of_rows(x):
        return jnp.repeat(x, sampling.samples_per_prompt, axis=0, total_repeat_length=num_rows)

    return Rollout(
        prompt_tokens=of_rows(prompts.tokens),
        prompt_mask=of_rows(prompts.mask),
        response_tokens=ended.tokens,
        response_mask=ended.mask,
        logprobs=ended.logprobs,
        has_eos=ended.stopped,
        hidden_states=None
        if trunk is None
        else jnp.concatenate([of_rows(hidden), ended.hidden], axis=1),
    )


def check_slots(sampling: Sampling, num_slots: int, num_rows: int, networks: tuple) -> None:
    """Raise a ValueError where the slots cannot serve the rows."""
    samples, group = sampling.samples_per_prompt, sampling.group(num_slots)
    if num_slots < num_rows and group > num_slots:
        raise ValueError(
            f"min_free_slots must be at most {num_slots} and a multiple of samples_per_prompt "
            f"({samples}), got {group}"
        )
    if num_slots % samples:
        raise ValueError(
            f"max_concurrent must be a multiple of samples_per_prompt ({samples}), got {num_slots}"
        )
    without = [n for n in networks if n is not None and n.refill is None]
    if without and (num_slots < num_rows or samples > 1):
        raise ValueError(
            "max_concurrent and samples_per_prompt need a network with `refill`, this one has none"
        )


@renamed(segments="segment_ids", at="output_positions")
def response_outputs(
    network: Network,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    *,
    response_length: int,
    segment_ids: jax.Array | None = None,
    output_positions: jax.Array | None = None,
) -> jax.Array:
    """What a network gives before each response token, and nowhere else.

    Args:
        network: a policy, or a value network.
        params: its parameters.
        inputs: [B, L] int32 tokens or [B, L, D] hidden states, the response in the last T.
        mask: [B, L] bool.
        response_length: T.
        segment_ids: of packed rows, see `Experience`; inputs and mask then have L - 1 positions.
        output_positions: of packed rows.

    Returns:
        [B, T, V] float32, the logits that predict each token, or [B, T] float32, the value of the
        state before it.
    """
    inputs, mask, where = predictors(inputs, mask, response_length, segment_ids, output_positions)
    return network.apply(params, inputs, mask, **where)


def predictors(inputs, mask, response_length, segment_ids, output_positions):
    """(inputs, mask, where to read the outputs) of the positions that predict something."""
    if output_positions is not None:
        return inputs, mask, {"segment_ids": segment_ids, "output_positions": output_positions}
    return inputs[:, :-1], mask[:, :-1], {"first_output": mask.shape[1] - response_length - 1}


@renamed(segments="segment_ids", at="output_positions")
def response_statistics(
    network: Network,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    segment_ids: jax.Array | None = None,
    output_positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each response token, and the entropy of the distribution it is from.

    By the network's own `token_statistics` where it has them, else from all logits at once.

    Args:
        network: a policy.
        params: its parameters.
        inputs: [B, L] int32 tokens or [B, L, D] hidden states, the response in the last T.
        mask: [B, L] bool.
        tokens: [B, T] int32, the response.
        temperature: divides the logits; 0 counts as 1.
        segment_ids: see `response_outputs`.
        output_positions: see `response_outputs`.

    Returns:
        (logprobs, entropies in nats), each [B, T] float32, undefined where mask is False.
    """
    inputs, mask, where = predictors(inputs, mask, tokens.shape[1], segment_ids, output_positions)
    if network.token_statistics is not None:
        return network.token_statistics(params, inputs, mask, tokens, temperature, **where)
    logits = network.apply(params, inputs, mask, **where)
    return token_statistics(logits, tokens, temperature=temperature)
