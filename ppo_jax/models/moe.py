"""A feed-forward layer as a mixture of experts: each token has the few that a router chooses.

Dropless: an expert computes all tokens that chose it, be they all. On a mesh the experts are
sharded. Devices that share rows have all of their tokens; each computes those of its own experts,
and the results are summed. Devices with rows of their own exchange them, see `expert_exchange`.

Dimension key: B sequences, S positions, N = B S tokens, k experts of a token, P = N k pairs of a
token and an expert, E experts, D model, F width of an expert.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.core import cpu
from ppo_jax.core.grouped import grouped_matmul
from ppo_jax.core.router import router_statistics
from ppo_jax.models.axes import EXPERTS, HIDDEN, ShardingConstraint, gathered, unconstrained
from ppo_jax.models.config import Experts, ModelConfig
from ppo_jax.models.expert_exchange import exchange
from ppo_jax.models.layers import ACTIVATIONS

# Collections of Flax variables. The first two are written where the caller asks for them, by
# `mutable`, and else not computed; the other two are given. Each has one variable of a layer.
STATISTICS = "router_statistics"  # `RouterStatistics`
CHOSEN = "router_chosen"  # [B, S, k] int, the experts of each token
REPLAYED = "router_replayed"  # [B, S, k] int, the experts that each token has; E or more: any
COMPARED = "router_compared"  # [B, S, k] int, what the statistics compare the choices with
ROUTER = (STATISTICS, CHOSEN, REPLAYED, COMPARED)
VARIABLE = "experts"  # its name in each


class MoE(nn.Module):
    """The sum of the chosen experts' outputs by their weights, each expert a gated MLP; 0 where
    `real_BS` is False."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD, real_BS):
        c, experts, constrain = self.config, self.config.experts, self.constrain
        num, width = experts.num_experts, experts.dim
        kernel = functools.partial(ExpertKernel, dtype=x_BSD.dtype, constrain=constrain)
        router_DE = kernel((c.embed_dim, num), name="router")()
        logits_BSE = constrain(cpu.matmul(x_BSD, router_DE, "float32"), HIDDEN)
        gate = kernel((num, c.embed_dim, width), name="gate")()
        up = kernel((num, c.embed_dim, width), name="up")()
        down = kernel((num, width, c.embed_dim), name="down")()
        axes = constrain.mesh_axes("expert", num)
        replayed_BSk = self.get_variable(REPLAYED, VARIABLE)
        rows = constrain.mesh_axes("batch", len(x_BSD))
        exchanged = tuple(name for name in axes if name in rows)
        compute = functools.partial(mixture, experts, ACTIVATIONS[c.mlp], axes, row_axes=exchanged)
        arrays = x_BSD, real_BS, logits_BSE, gate, up, down
        placed = HIDDEN, ("batch", None), HIDDEN, *(("expert", None, None),) * 3
        if replayed_BSk is not None:
            arrays, placed = (*arrays, replayed_BSk), (*placed, HIDDEN)
        mapped = functools.partial(constrain.shard_map, compute, placed)
        y_BSD, chosen_BSk = (mapped if constrain.sharding else compute)(*arrays)
        self.record(CHOSEN, lambda: chosen_BSk)
        before_BSk = self.get_variable(COMPARED, VARIABLE)
        statistics = functools.partial(router_statistics, logits_BSE, chosen_BSk, real_BS)
        self.record(STATISTICS, lambda: statistics(before_BSk))
        return y_BSD

    def record(self, collection, value):
        """Write value() where the caller asks for the collection."""
        if self.is_mutable_collection(collection) and not self.is_initializing():
            self.put_variable(collection, VARIABLE, value())


class ExpertKernel(nn.Module):
    """The matrices of all experts, or that of the router."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape)
        return self.constrain(jnp.asarray(kernel).astype(self.dtype), gathered(EXPERTS[self.name]))


def route(
    logits_NE: jax.Array, experts: Experts, chosen_Nk: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(weights, experts) of each token, [N, k] both: those with the largest softmax; or the given
    ones, where all of a token are below E."""
    probs_NE = jax.nn.softmax(logits_NE)
    weights_Nk, own_Nk = jax.lax.top_k(probs_NE, experts.num_chosen)
    if chosen_Nk is None:
        chosen_Nk = own_Nk
    else:
        given_N1 = (chosen_Nk < experts.num_experts).all(-1, keepdims=True)
        chosen_Nk = jnp.where(given_N1, chosen_Nk.astype(own_Nk.dtype), own_Nk)
        weights_Nk = jnp.take_along_axis(probs_NE, chosen_Nk, axis=-1)
    if experts.normalized:
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdims=True)
    return weights_Nk, chosen_Nk


def mixture(
    experts,
    activation,
    mesh_axes,
    x_BSD,
    real_BS,
    logits_BSE,
    gate,
    up,
    down,
    replayed_BSk=None,
    *,
    row_axes=(),
):
    """(the outputs [B, S, D] of the experts whose kernels are given, the experts of each token
    [B, S, k]: those replayed, or what the router chooses). On a mesh the outputs are summed over
    `mesh_axes`, whose devices hold the others; along `row_axes` of them the rows differ, too."""
    x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
    logits_NE = logits_BSE.reshape(-1, logits_BSE.shape[-1])
    replayed_Nk = None if replayed_BSk is None else replayed_BSk.reshape(-1, experts.num_chosen)
    weights_Nk, chosen_Nk = route(logits_NE, experts, replayed_Nk)
    computed_Nk = jnp.where(real_BS.reshape(-1, 1), chosen_Nk, experts.num_experts)  # or by nobody
    first = jax.lax.axis_index(mesh_axes) * len(gate) if mesh_axes else 0
    compute, kernels = functools.partial(outputs, activation), (gate, up, down)
    if row_axes:
        arrays = x_ND, weights_Nk, computed_Nk, first, kernels
        y_ND = exchange(compute, row_axes, experts.num_experts, *arrays)
    else:
        y_ND = own_sum(compute, x_ND, weights_Nk, computed_Nk - first, kernels)
    sharing = tuple(name for name in mesh_axes if name not in row_axes)
    y_ND = jax.lax.psum(y_ND, sharing) if sharing else y_ND
    chosen_BSk = chosen_Nk.reshape(*real_BS.shape, -1)
    return y_ND.reshape(x_BSD.shape).astype(x_BSD.dtype), chosen_BSk


def own_sum(compute, x_ND, weights_Nk, own_Nk, kernels):
    """The outputs [N, D] of those of each row's experts that are among the given ones."""
    k, num_own = own_Nk.shape[1], len(kernels[0])
    here_Nk = (own_Nk >= 0) & (own_Nk < num_own)
    group_P = jnp.where(here_Nk, own_Nk, num_own).reshape(-1)
    order_P = jnp.argsort(group_P)
    place_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(len(order_P)))  # its inverse
    sizes_E = (group_P[:, None] == jnp.arange(num_own)[None]).sum(0, dtype=jnp.int32)
    x_PD = permuted(jnp.repeat(x_ND, k, axis=0), order_P, place_P)
    y_PD = permuted(compute(x_PD, sizes_E, kernels), place_P, order_P)
    weights_Nk = jnp.where(here_Nk, weights_Nk, 0)
    y_NkD = y_PD.reshape(-1, k, y_PD.shape[-1])
    return (weights_Nk[..., None] * y_NkD).sum(1)


def outputs(activation, x_PD, sizes_E, kernels):
    """Of rows that are sorted by their expert, [P, D]."""
    gate, up, down = kernels
    hidden_PF = activation(grouped_matmul(x_PD, gate, sizes_E)) * grouped_matmul(x_PD, up, sizes_E)
    return grouped_matmul(hidden_PF, down, sizes_E)


@jax.custom_vjp
def permuted(x_PD: jax.Array, order_P: jax.Array, inverse_P: jax.Array) -> jax.Array:
    """x[order], whose gradient is read in order as well, and not added row by row."""
    return x_PD[order_P]


def _permuted_forward(x_PD, order_P, inverse_P):
    return x_PD[order_P], inverse_P


def _permuted_backward(inverse_P, g_PD):
    return g_PD[inverse_P], None, None


permuted.defvjp(_permuted_forward, _permuted_backward)
