"""The programs of one PPO iteration without any arrays: rollout, scoring, update.

They are made of the loop's own pieces; with a reward model the loop compiles all three as one, so
that a plan's memory is an estimate of it. Their arguments are shapes, so that they can be compiled
for devices that are not there.

Dimension key: N responses, P prompt tokens, T response tokens.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.experience import make_experience, response_scores, sample_responses
from ppo_jax.algorithms.ppo import init_ppo, ppo_update
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings
from ppo_jax.config.stages import LoRASettings, PPOSettings
from ppo_jax.core.advantages import needs_critic
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState, Prompts
from ppo_jax.distributed.layout import Layout, abstract
from ppo_jax.io import huggingface as hf
from ppo_jax.io.base_model import llama_config
from ppo_jax.io.model_spec import parameters_of
from ppo_jax.io.stage_folder import Model, describe_stage, stage_config
from ppo_jax.models.config import ModelConfig, computation
from ppo_jax.models.families import read_config
from ppo_jax.models.families.presets import SHAPES, published_config
from ppo_jax.models.partition import start_layer
from ppo_jax.planner import flops
from ppo_jax.planner.hlo.trip_counts import Trips
from ppo_jax.rollout.continuous_batching import max_trip_counts
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo_setup import (
    begin_models,
    make_hyperparameters,
    make_networks,
    make_options,
    network_starts,
    split_models,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The shapes of all models of a run."""

    policy: ModelConfig  # and of the reference
    critic: ModelConfig | None  # None: advantages come without one
    reward: ModelConfig | None  # None: scores come from a function


def read_models(config: Config) -> Models:
    """The shapes of all models of a run, from the table of public models or from a config.json.

    No weights are read and nothing is fetched from a hub. A stage that is not there yet has the
    shape of the base model.

    Raises:
        ValueError: there is no ppo section, or `model.path` is neither a public model of the table
            nor there.
    """
    if config.ppo is None:
        raise ValueError("plan needs a config with a ppo section, got none")
    s = config.ppo
    base = base_shape(config.model)
    policy = shape_at(s.init_from, config.model) or base
    reward = None
    if s.reward_model:
        reward = shape_at(s.reward_model, config.model) or base
        if s.reward_model == "reward" and config.reward and config.reward.num_layers:
            reward = dataclasses.replace(reward, num_layers=config.reward.num_layers)
    critic = None
    if needs_critic(s.advantages):
        critic = policy if reward is None or s.critic_init_from == "policy" else reward
    return Models(policy=policy, critic=critic, reward=reward)


def common_layers(config: Config, models: Models) -> int:
    """How many of the lowest layers policy and reward model have in common as PPO begins, by what
    the stages of the config leave as it is; 0 for a reward model from elsewhere, or none."""
    if models.reward is None:
        return 0
    depths = {"sft": models.policy, "reward": models.reward}
    policy, reward = (
        ancestors(config, name, depths) for name in (config.ppo.init_from, config.ppo.reward_model)
    )
    return max((min(policy[name], reward[name]) for name in policy.keys() & reward), default=0)


def ancestors(config: Config, name: str, shapes: Mapping[str, ModelConfig]) -> dict[str, int]:
    """{what a model was made from, itself first: how many of its lowest layers it still has}."""
    kept = max(shape.num_layers for shape in shapes.values())
    found = {name: kept}
    while settings := name in shapes and getattr(config, name):
        kept = min(kept, start_layer(shapes[name], settings.trainable) or 0)
        name = "base" if name == "sft" else settings.init_from
        found[name] = kept
    return found


def shape_at(name: str, settings: ModelSettings) -> ModelConfig | None:
    """The shape of a stage by its folder, or of a model; None where there is nothing yet."""
    if name in ("base", *STAGE_NAMES):  # of the run itself, see `models.resolve`
        return None
    how = computation(settings)
    if description := describe_stage(Path(name)):
        return dataclasses.replace(stage_config(description), **how)
    if name in SHAPES:
        return published_config(name, **how)
    there = os.path.exists(name) or name.startswith("package:")
    return hf.load_config(name, **how) if there else None


def base_shape(settings: ModelSettings) -> ModelConfig:
    """The shape of `model`; a vocabulary is taken whole."""
    if scratch := settings.scratch:
        raw = llama_config(scratch, scratch.vocab_size, 0)
        return read_config(raw, **computation(settings))
    if found := shape_at(settings.path, settings):
        return found
    raise ValueError(
        f"model.path must be a folder with a config.json, a .gguf file, 'package:NAME' or one of "
        f"{sorted(SHAPES)} to plan, got {settings.path!r}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One program of an iteration, and what it should cost by the shapes alone."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    trips: Trips  # of its loops whose end depends on data, at worst
    flops: float  # of all devices together, with what is computed again, see `flops`
    model_flops: float  # the same without what is computed again, with plain attention


def phases(config: Config, models: Models, layouts: tuple[Layout, Layout]) -> list[Phase]:
    """Rollout, scoring and update of a config.

    Every program keeps all of the state and of the frozen parameters among its arguments, read or
    not: in a run they stay in memory all the time. What two networks share counts for each of them,
    as the compiler counts it.

    Args:
        config: of the run.
        models: its shapes.
        layouts: of the updates, and of the rollout; their devices may be described ones.
    """
    s, layout = config.ppo, layouts[0]
    args = Arguments(config, models, layouts)
    options = make_options(s, make_sampling(s))
    parts = dict(networks=args.networks, options=options)
    rows, whole = layout.batch_sharding, layout.replicated
    state_lies = jax.tree.map(lambda leaf: leaf.sharding, args.state)

    def program(function, *inputs, **out):
        bound = functools.partial(function, **parts)
        traced = jax.jit(bound, keep_unused=True, **out).trace
        return traced(args.state, args.numbers, *inputs, frozen=args.frozen)

    rollout = program(sample_responses, args.prompts, args.key, out_shardings=rows)
    scores = () if models.reward else (args.rows((), jnp.float32),)
    scoring = program(score, args.as_rows(rollout.out_info), *scores, out_shardings=(rows, whole))
    experience = args.as_rows(scoring.out_info[0])
    updates = program(
        update, experience, args.key, donate_argnums=0, out_shardings=(state_lies, whole)
    )
    lower = {"rollout": rollout.lower, "scoring": scoring.lower, "update": updates.lower}
    at_once = dataclasses.replace(s, logits_chunk=0)
    with_again = analytic_flops(s, models, args.starts, layout.constrain.platform)
    once = analytic_flops(at_once, without_remat(models), args.starts)
    trips: dict[str, Trips] = {"rollout": rollout_turns(s, options.sampling)}
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


def rollout_turns(settings: PPOSettings, sampling: Sampling) -> Trips:
    """Of the decode loops, where every response has its full length."""
    rows, slots, length = (
        settings.rollout_batch_size,
        sampling.max_concurrent,
        sampling.response_length,
    )
    if slots in (0, rows):
        return length
    return max_trip_counts(rows, slots, sampling.group(slots), length)


def score(state, hyperparameters, rollout, scores=None, *, frozen, networks, options):
    """What lies between the rollout and the updates."""
    if scores is None:
        scores = response_scores(rollout, frozen=frozen, networks=networks)
    parts = dict(frozen=frozen, networks=networks, options=options)
    return make_experience(rollout, scores, state, hyperparameters, **parts)


def update(state, hyperparameters, experience, key, **parts):
    """`ppo_update` with its arguments in the order of the other two."""
    return ppo_update(state, experience, hyperparameters, key, **parts)


def make_sampling(settings: PPOSettings) -> Sampling:
    """With some stop token: no program depends on which it is."""
    shape = {k: getattr(settings, k) for k in ("response_length", "top_k", "top_p", "min_p")}
    return Sampling(eos_ids=(0,), **shape)


class Arguments:
    """What the programs are given, as shapes with their shardings, and the networks in them."""

    def __init__(self, config: Config, models: Models, layouts: tuple[Layout, Layout]):
        s, self.layout, self.batch = config.ppo, layouts[0], config.ppo.rollout_batch_size
        self.samples = s.samples_per_prompt
        numbers = make_hyperparameters(s)
        self.numbers = jax.tree.map(lambda x: self.whole(x.dtype), numbers)
        self.key = self.whole(jax.random.key(0).dtype)
        found = abstract_models(config, models, self.layout)
        shared = functools.partial(planned_sharing, config, models)
        self.starts = network_starts(s, *found, shared)
        policy, reward, critic = (None if m is None else m.config for m in found)
        shapes = policy, critic, reward
        self.networks = make_networks(*shapes, self.starts, layouts, s.logits_chunk)

        def split(params: Sequence[Params]) -> tuple[FrozenParams, Params, Params]:
            pairs = zip(found, params, strict=True)
            filled = (m and dataclasses.replace(m, params=p) for m, p in pairs)
            return split_models(s, *filled, self.starts)

        def frozen(params: Sequence[Params]) -> FrozenParams:
            return jax.tree.map(lambda x: x.astype(config.model.frozen_dtype), split(params)[0])

        def state(params: Sequence[Params], numbers: Hyperparameters) -> PPOState:
            return init_ppo(*split(params)[1:], numbers)

        params = [m and m.params for m in found]
        self.frozen = abstract(self.layout, frozen, params)
        self.state = abstract(self.layout, state, params, numbers)
        prompt = (s.max_prompt_length,)
        self.prompts = Prompts(
            tokens=self.prompts_of(prompt, jnp.int32), mask=self.prompts_of(prompt, bool)
        )

    def as_rows(self, given: Any) -> Any:
        """What a program gives of each response, as an argument of the next."""
        return jax.tree.map(lambda x: x.update(sharding=self.layout.batch_sharding), given)

    def rows(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """[N, *shape]"""
        return jax.ShapeDtypeStruct(
            (self.batch, *shape), dtype, sharding=self.layout.batch_sharding
        )

    def prompts_of(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """[N / samples_per_prompt, *shape]"""
        count = self.batch // self.samples
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=self.layout.batch_sharding)

    def whole(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=self.layout.replicated)


def abstract_models(
    config: Config, models: Models, layout: Layout
) -> tuple[Model, Model | None, Model | None]:
    """(policy, reward model, critic) as PPO begins, with shapes in place of parameters."""

    def of(kind: str, shape: ModelConfig | None) -> Model | None:
        if shape is None:
            return None
        return Model(kind=kind, config=shape, params=parameters_of(kind, shape), tokenizer=None)

    policy, reward = of("policy", models.policy), of("reward", models.reward)
    return begin_models(config.ppo, policy, reward, config.seed, layout, abstract)


def planned_sharing(config: Config, models: Models, policy: Model, other: Model) -> int:
    """How many of the lowest layers two models will have in common, see `shared_layers`."""
    if other.params["embed"] is policy.params["embed"]:  # a critic on the policy's body
        return other.config.num_layers
    return common_layers(config, models)


def without_remat(models: Models) -> Models:
    """The same models, of which nothing is computed again."""
    found = {name: getattr(models, name) for name in ("policy", "critic", "reward")}
    plain = {k: v and dataclasses.replace(v, remat="none") for k, v in found.items()}
    return Models(**plain)


def analytic_flops(
    settings: PPOSettings,
    models: Models,
    starts: Sequence[int | None] = (None,) * 3,
    platform: str | None = None,
) -> dict[str, float]:
    """What each phase should compute, on all devices together.

    Args:
        settings: the ppo section.
        models: the shapes.
        starts: where policy, critic and reward model start above the trunk.
        platform: whose attention it is, see `attention_kernels.kernel_of`.
    """
    s = settings
    where = dict(
        sequences=s.rollout_batch_size,
        prompt_length=s.max_prompt_length,
        response_length=s.response_length,
    )
    policy, critic = models.policy, models.critic
    trunks = [start or 0 for start in starts]
    trained = [gradients_of(policy, s.trainable, trunks[0], s.lora, "logits")]
    if critic is not None:
        trained.append(gradients_of(critic, s.value_trainable, trunks[1], s.lora, "scalar"))
    passes = 2 if s.old_logprobs == "recompute" else 1
    of_adapters = (passes - 1) * policy.num_layers * trained[0].adapters
    if critic is not None:
        of_adapters += critic.num_layers * trained[1].adapters
    positions = s.rollout_batch_size * (s.max_prompt_length + s.response_length - 1)
    return {
        "rollout": flops.rollout_flops(
            policy,
            samples_per_prompt=s.samples_per_prompt,
            slots=s.max_concurrent,
            group=make_options(s, make_sampling(s)).sampling.group(s.max_concurrent),
            **where,
        ),
        "scoring": positions * of_adapters
        + flops.scoring_flops(
            policy,
            critic,
            models.reward,
            logits_chunk=s.logits_chunk,
            policy_passes=passes,
            platform=platform,
            trunks=trunks,
            **where,
        ),
        "update": flops.update_flops(
            policy,
            critic,
            num_epochs=s.num_epochs,
            logits_chunk=s.logits_chunk,
            platform=platform,
            trained=trained,
            **where,
        ),
    }


def gradients_of(
    shape: ModelConfig, trainable: str | int, trunk: int, lora: LoRASettings, head: str
) -> flops.Trained:
    """What has gradients of a network above a trunk; its head gives "logits" or a "scalar"."""
    if trainable == "lora":
        adapters = flops.adapter_flops(shape, lora.targets, lora.rank)
        return flops.Trained(adapters=adapters, head=head == "scalar")
    frozen = (start_layer(shape, trainable) or 0) - trunk
    frozen_head = head == "logits" and shape.tie_embeddings and trainable != "all"
    return flops.Trained(trunk=trunk, frozen_layers=frozen, head=not frozen_head)
