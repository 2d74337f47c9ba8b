"""The programs of one PPO iteration without any arrays: rollout, scoring, update.

They are made of the loop's own pieces; with a reward model the loop compiles all three as one, so
that a plan's memory is an estimate of it. Their arguments are shapes, so that they can be compiled
for devices that are not there.

Dimension key: N responses, P prompt tokens, T response tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax import flops
from ppo_jax.config import Config, PPOSettings
from ppo_jax.experience import (
    PPONetworks,
    make_experience,
    response_scores,
    sample_responses,
)
from ppo_jax.networks import Network
from ppo_jax.plan_shapes import Models
from ppo_jax.ppo import init_ppo, ppo_update
from ppo_jax.ppo_setup import make_hyperparameters, make_networks, make_recipe
from ppo_jax.sampling import Sampling
from ppo_jax.sharding import Layout, abstract
from ppo_jax.structs import Experience, Frozen, Prompts, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One program of an iteration, and what it should cost by the shapes alone."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    trips: int | None  # of its loop whose end depends on data, at worst
    flops: float  # of all devices together, with what is computed again, see `flops`
    model_flops: float  # the same without what is computed again, with plain attention


def phases(config: Config, models: Models, layouts: tuple[Layout, Layout]) -> list[Phase]:
    """Rollout, scoring and update of a config.

    Every program keeps all of the state and of the frozen parameters among its arguments, read or
    not: in a run they stay in memory all the time.

    Args:
        config: of the run.
        models: its shapes.
        layouts: of the updates, and of the rollout; their devices may be described ones.
    """
    s, layout = config.ppo, layouts[0]
    shapes = models.policy, models.critic, models.reward
    networks = make_networks(*shapes, (None,) * 3, layouts, s.logits_chunk)
    args = Arguments(config, networks, layout)
    parts = dict(networks=networks, recipe=make_recipe(s, make_sampling(s)))
    rows, whole = layout.rows, layout.whole
    state_lies = jax.tree.map(lambda leaf: leaf.sharding, args.state)

    def program(function, *inputs, **out):
        bound = functools.partial(function, **parts)
        compiled = jax.jit(bound, keep_unused=True, **out)
        return lambda: compiled.lower(args.state, args.numbers, *inputs, frozen=args.frozen)

    scores = () if models.reward else (args.rows((), jnp.float32),)
    lower = {
        "rollout": program(sample_responses, args.prompts, args.key, out_shardings=rows),
        "scoring": program(score, args.rollout, *scores, out_shardings=(rows, whole)),
        "update": program(
            update, args.experience, args.key, donate_argnums=0, out_shardings=(state_lies, whole)
        ),
    }
    at_once = dataclasses.replace(s, logits_chunk=0)
    with_again = analytic_flops(s, models, layout.constrain.platform)
    once = analytic_flops(at_once, without_remat(models))
    trips = {"rollout": s.response_length}
    if s.packing:
        trips["update"] = s.num_micro_batches
    return [
        Phase(
            name=name,
            lower=lower[name],
            trips=trips.get(name),
            flops=with_again[name],
            model_flops=once[name],
        )
        for name in lower
    ]


def score(state, hyperparameters, rollout, scores=None, *, frozen, networks, recipe):
    """What lies between the rollout and the updates."""
    if scores is None:
        scores = response_scores(rollout, frozen=frozen, networks=networks)
    parts = dict(frozen=frozen, networks=networks, recipe=recipe)
    return make_experience(rollout, scores, state, hyperparameters, **parts)


def update(state, hyperparameters, experience, key, **parts):
    """`ppo_update` with its arguments in the order of the other two."""
    return ppo_update(state, experience, hyperparameters, key, **parts)


def make_sampling(settings: PPOSettings) -> Sampling:
    """With some stop token: no program depends on which it is."""
    shape = {k: getattr(settings, k) for k in ("response_length", "top_k", "top_p", "min_p")}
    return Sampling(eos_ids=(0,), **shape)


class Arguments:
    """What the programs are given, as shapes with their shardings."""

    def __init__(self, config: Config, networks: PPONetworks, layout: Layout):
        s, self.layout, self.batch = config.ppo, layout, config.ppo.rollout_batch_size
        self.samples = s.samples_per_prompt
        numbers = make_hyperparameters(s)
        self.numbers = jax.tree.map(lambda x: self.whole(x.dtype), numbers)
        self.key = self.whole(jax.random.key(0).dtype)

        def init(network: Network) -> Any:
            return jax.eval_shape(network.init, jax.random.key(0))

        policy = init(networks.policy)
        self.state = abstract(layout, init_ppo, policy, init(networks.value), numbers)
        frozen_dtype = jnp.dtype(config.model.frozen_dtype)

        def freeze(params: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(frozen_dtype), params)

        self.frozen = Frozen(
            ref_policy=abstract(layout, freeze, policy),
            reward=networks.reward and abstract(layout, freeze, init(networks.reward)),
        )
        prompt, response = s.max_prompt_length, s.response_length
        texts = self.rows((prompt + response,), jnp.int32)
        numbers_of_tokens = self.rows((response,), jnp.float32)
        tokens = dict(
            response_tokens=self.rows((response,), jnp.int32),
            response_mask=self.rows((response,), bool),
            logprobs=numbers_of_tokens,
        )
        self.prompts = Prompts(
            tokens=self.prompts_of((prompt,), jnp.int32), mask=self.prompts_of((prompt,), bool)
        )
        self.rollout = Rollout(
            prompt_tokens=self.rows((prompt,), jnp.int32),
            prompt_mask=self.rows((prompt,), bool),
            has_eos=self.rows((), bool),
            **tokens,
        )
        self.experience = Experience(
            policy_inputs=texts,
            value_inputs=texts,
            mask=self.rows((prompt + response,), bool),
            values=numbers_of_tokens,
            advantages=numbers_of_tokens,
            returns=numbers_of_tokens,
            **tokens,
        )

    def rows(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """[N, *shape]"""
        return jax.ShapeDtypeStruct((self.batch, *shape), dtype, sharding=self.layout.rows)

    def prompts_of(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """[N / samples_per_prompt, *shape]"""
        count = self.batch // self.samples
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=self.layout.rows)

    def whole(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=self.layout.whole)


def without_remat(models: Models) -> Models:
    """The same models, of which nothing is computed again."""
    found = {name: getattr(models, name) for name in ("policy", "critic", "reward")}
    plain = {k: v and dataclasses.replace(v, remat="none") for k, v in found.items()}
    return Models(**plain)


def analytic_flops(
    settings: PPOSettings, models: Models, platform: str | None = None
) -> dict[str, float]:
    """What each phase should compute, on all devices together, with that platform's attention."""
    s = settings
    where = dict(
        sequences=s.rollout_batch_size,
        prompt_length=s.max_prompt_length,
        response_length=s.response_length,
    )
    return {
        "rollout": flops.rollout_flops(
            models.policy, samples_per_prompt=s.samples_per_prompt, **where
        ),
        "scoring": flops.scoring_flops(
            models.policy,
            models.critic,
            models.reward,
            logits_chunk=s.logits_chunk,
            policy_passes=2 if s.old_logprobs == "recompute" else 1,
            platform=platform,
            **where,
        ),
        "update": flops.update_flops(
            models.policy,
            models.critic,
            num_epochs=s.num_epochs,
            logits_chunk=s.logits_chunk,
            platform=platform,
            **where,
        ),
    }
