"""Supervised training steps: `(state, batch, optimizer) -> (state, metrics)`, pure, not jitted.

Dimension key: N texts, M pairs, B responses, P prompt tokens, T response tokens, L positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.core.checks import assert_divides
from ppo_jax.core.distributions import token_logprobs
from ppo_jax.core.losses import next_token_loss, preference_loss
from ppo_jax.core.network import Network, last_outputs, merge_params
from ppo_jax.core.optimizer import apply_gradients, schedule
from ppo_jax.core.router import RouterStatistics, load_balancing_loss
from ppo_jax.core.types import Optimizer, Params, PreferenceBatch, TextBatch, TrainState


def sft_loss(
    network: Network,
    params: Params,
    batch: TextBatch,
    *,
    normalizer: jax.Array | None = None,
    router_coef: float = 0.0,
    num_positions: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of the tokens in `loss_mask`, nats a token, and router_coef times the
    `load_balancing_loss` of all positions but the last of a row, which predicts nothing.

    Args:
        network: returns logits, or has `summed_logprobs`; it must take `segment_ids` where the
            batch has them.
        params: all of the network's.
        batch: N texts, or N rows of texts.
        normalizer: [] float, the token count to divide by; by default this batch's own.
        router_coef: 0 is without; anything else needs a network with experts.
        num_positions: [] float, real positions of the whole batch, of which this is a part: the
            loss of the routers counts by its share of these. By default it is all.

    Returns:
        (loss, metrics): sft/loss, the first of the two, and with a router_coef sft/router_loss.

    Raises:
        ValueError: a router_coef, and no experts.
    """
    if not router_coef:
        return likelihood_loss(network, params, batch, normalizer=normalizer)[:2]
    if network.routed is None:
        raise ValueError(f"router_coef must be 0 for a network without experts, got {router_coef}")
    given = network.routed, params, batch
    loss, metrics, statistics = likelihood_loss(*given, normalizer=normalizer, routed=True)
    balance = load_balancing_loss(statistics)
    if num_positions is not None:
        count = batch.mask[:, :-1].sum().astype(jnp.float32)
        balance = balance * count / jnp.maximum(num_positions, 1.0)
    metrics |= {"sft/router_loss": jax.lax.stop_gradient(balance)}
    return loss + router_coef * balance, metrics


def likelihood_loss(
    network: Network,
    params: Params,
    batch: TextBatch,
    *,
    normalizer: jax.Array | None,
    routed: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], RouterStatistics | None]:
    """(loss, metrics, the statistics of a `routed` network or None), the first term of
    `sft_loss`."""
    packed = {} if batch.segment_ids is None else {"segment_ids": batch.segment_ids[:, :-1]}
    args = params, batch.inputs[:, :-1], batch.mask[:, :-1]
    tokens, loss_mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    if network.summed_logprobs is None:
        result = network.apply(*args, **packed)
        logits, statistics = result if routed else (result, None)
        logprobs = token_logprobs(logits, tokens)
        return *next_token_loss(logprobs, loss_mask, normalizer=normalizer), statistics
    result = network.summed_logprobs(*args, tokens, loss_mask.astype(jnp.float32), **packed)
    total, statistics = result if routed else (result, None)
    count = loss_mask.sum() if normalizer is None else normalizer
    return *next_token_loss(total[None], jnp.ones(1, bool), normalizer=count), statistics


def sft_step(
    state: TrainState,
    batch: TextBatch,
    optimizer: Optimizer,
    *,
    network: Network,
    frozen: Params,
    num_micro_batches: int = 1,
    router_coef: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of supervised fine-tuning.

    Args:
        state: trained leaves and their optimizer state.
        batch: N rows, a multiple of `num_micro_batches`.
        optimizer: its numbers.
        network: returns logits; reads `batch.inputs`.
        frozen: the leaves of `network` that are not trained.
        num_micro_batches: the batch is held in memory in so many parts, one after the other; the
            gradient does not depend on it, but for that of the routers' loss: this is then the
            mean of the losses of the parts, by their real positions.
        router_coef: of the routers' loss, see `sft_loss`.

    Returns:
        (state, metrics).
    """
    counts = dict(normalizer=batch.loss_mask[:, 1:].sum().astype(jnp.float32))
    if router_coef:
        counts |= dict(num_positions=batch.mask[:, :-1].sum().astype(jnp.float32))

    def loss(params, micro_batch):
        params = merge_params(frozen, params)
        return sft_loss(network, params, micro_batch, router_coef=router_coef, **counts)

    gradient = jax.grad(loss, has_aux=True)
    gradients, metrics = accumulate(gradient, state.params, batch, num_micro_batches)
    return apply_update(state, gradients, metrics, optimizer, "sft")


def text_scores(
    network: Network,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    ends: jax.Array | None = None,
    num_micro_batches: int = 1,
) -> jax.Array:
    """Scores of whole texts, read at their last token.

    Args:
        network: returns one scalar a position; with `segment_ids` it must support packing.
        params: all of the network's.
        inputs: [N, L] int32 tokens, or [N, L, D] hidden states.
        mask: [N, L] bool.
        segment_ids: [N, L] int32 where a row holds several texts, see `Network`.
        ends: [N, K] int32, then the position of each text's last token.
        num_micro_batches: computed one after the other and, for the gradient, recomputed.

    Returns:
        [N] float32, or [N K] with `ends`.
    """

    def last_values(rows):
        inputs, mask, segment_ids, ends = rows
        if segment_ids is not None:
            where = dict(segment_ids=segment_ids, output_positions=ends)
            return network.apply(params, inputs, mask, **where)
        return last_outputs(network, params, inputs, mask)

    rows = inputs, mask, segment_ids, ends
    if num_micro_batches == 1:
        return last_values(rows).reshape(-1)
    scores = jax.lax.map(jax.checkpoint(last_values), split_batch(rows, num_micro_batches))
    return scores.swapaxes(0, 1).reshape(-1)


def reward_step(
    state: TrainState,
    batch: PreferenceBatch,
    optimizer: Optimizer,
    *,
    network: Network,
    frozen: Params,
    num_micro_batches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of reward-model training on preferences between the texts of one batch.

    Each text is run once, however many pairs it is in. Arguments as for `sft_step`.
    """

    def loss(params):
        scores = text_scores(
            network,
            merge_params(frozen, params),
            batch.inputs,
            batch.mask,
            segment_ids=batch.segment_ids,
            ends=batch.ends,
            num_micro_batches=num_micro_batches,
        )
        chosen, rejected = scores[batch.pairs[:, 0]], scores[batch.pairs[:, 1]]
        margin = 0.0 if batch.margins is None else batch.margins
        return preference_loss(chosen, rejected, margin=margin, mask=batch.valid)

    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return apply_update(state, gradients, metrics, optimizer, "reward_model")


def apply_update(
    state: TrainState, gradients: Params, metrics: dict, optimizer: Optimizer, group: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply gradients at the scheduled learning rate; add the rate and the norm to the metrics."""
    rate = optimizer.learning_rate * schedule(optimizer, state.step)
    params, opt_state, norm = apply_gradients(
        optimizer, gradients, state.opt_state, state.params, rate
    )
    metrics = metrics | {f"{group}/learning_rate": rate, f"{group}/grad_norm": norm}
    return dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state
    ), metrics


def split_batch(batch: Any, count: int) -> Any:
    """Every leaf [N, ...] as [count, N / count, ...]; micro-batch i has the rows i, i + count, ...

    So each device, which holds neighbouring rows, has its share of every micro-batch.

    Raises:
        ValueError: `count` does not divide N.
    """
    assert_divides(len(jax.tree.leaves(batch)[0]), "rows", num_micro_batches=count)
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def accumulate(
    gradient: Callable[..., tuple[Params, dict]], params: Params, batch: Any, num_micro_batches: int
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient and metrics of a loss summed over micro-batches.

    Args:
        gradient: (params, micro_batch) -> (gradients, metrics), both divided by the count of the
            *whole* batch, so that they add up. Metrics named `*_max` are maxima instead.
        params: differentiated.
        batch: a tree of [N, ...].
        num_micro_batches: divides N.

    Returns:
        (gradients, metrics).
    """
    if num_micro_batches == 1:
        return gradient(params, batch)
    micro_batches = split_batch(batch, num_micro_batches)
    first = gradient(params, jax.tree.map(lambda x: x[0], micro_batches))
    rest = jax.tree.map(lambda x: x[1:], micro_batches)
    return jax.lax.scan(lambda sums, x: (add(sums, gradient(params, x)), None), first, rest)[0]


def accumulate_while(
    gradient: Callable[..., tuple[Params, dict]],
    params: Params,
    micro_batch: Callable[[jax.Array], Any],
    count: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
    """`accumulate` over micro_batch(0), .. micro_batch(count - 1), with a traced count.

    Maxima of the metrics are at least 0.
    """
    shapes = jax.eval_shape(lambda: gradient(params, micro_batch(jnp.int32(0))))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(
        0, count, lambda i, sums: add(sums, gradient(params, micro_batch(i))), zeros
    )


def add(sums: tuple[Params, dict], new: tuple[Params, dict]) -> tuple[Params, dict]:
    """(gradients, metrics) of two micro-batches together, see `accumulate`."""
    gradients, metrics = jax.tree.map(jnp.add, sums, new)
    maxima = {k: jnp.maximum(v, sums[1][k]) for k, v in new[1].items() if k.endswith("_max")}
    return gradients, metrics | maxima
