"""The programs of one PPO iteration over abstract arrays: rollout, scoring, update.

They call the functions of the training loop; with a reward model the loop compiles all three as
one, so that a plan's memory is an estimate of it. Their arguments are shapes with shardings, so
that they compile for devices that are not there.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.experience import (
    PPOOptions,
    make_experience,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.greedy import greedy_options, greedy_responses
from ppo_jax.algorithms.ppo import kl_of_update
from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.config.objectives import needs_critic, needs_greedy
from ppo_jax.config.ppo import AVERAGE, PPOSettings, names_critic
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings
from ppo_jax.config.stages import LoRASettings
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState, Prompts
from ppo_jax.distributed.layout import Layout, abstract
from ppo_jax.inference.generate import prompt_width
from ppo_jax.io import huggingface as hf
from ppo_jax.io.base_model import llama_config
from ppo_jax.io.critics import critic_config, has_critic
from ppo_jax.io.model_spec import ModelSpec, parameters_of, reread_reason
from ppo_jax.io.stage_folder import Model, describe_stage, split_step, stage_config
from ppo_jax.io.tokenizers import load_tokenizer
from ppo_jax.models.build import reward_network
from ppo_jax.models.config import ModelConfig, computation
from ppo_jax.models.families import read_config
from ppo_jax.models.families.presets import SHAPES, published_config
from ppo_jax.models.partition import start_layer
from ppo_jax.planner.flops import (
    TrainedParts,
    adapter_flops,
    attended_in_row,
    forward_flops,
    rollout_flops,
    scoring_flops,
    update_flops,
)
from ppo_jax.planner.hlo.trip_counts import TripCounts
from ppo_jax.rollout.continuous_batching import max_trip_counts
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo_setup import (
    begin_models,
    make_hyperparameters,
    make_networks,
    make_options,
    network_starts,
    split_models,
    state_maker,
    with_ensemble,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The configs of all models of a run."""

    policy: ModelConfig  # and of the reference
    critic: ModelConfig | None  # None: advantages need none
    reward: ModelConfig | None  # None: scores come from a function
    reads_text: bool = False  # the reward model, in a program of its own
    others: tuple[ModelConfig, ...] = ()  # more reward models


def read_models(config: Config) -> Models:
    """The configs of all models of a run, from the table of public models or from a config.json.

    No weights are read and nothing is fetched from a hub. A stage that is not there yet has the
    config of the base model.

    Raises:
        ValueError: there is no ppo section, or `model.path` is neither a public model of the table
            nor there.
    """
    if config.ppo is None:
        raise ValueError("plan needs a config with a ppo section, got none")
    s, base = config.ppo, read_base_config(config.model)
    policy = read_model_config(s.init_from, config.model) or base
    reward = scorer_config(s.reward_model, config, base) if s.reward_model else None
    critic, by_text = None, reward is not None and reads_text(config, policy, reward)
    if names_critic(s):
        critic = scorer_config(s.critic_init_from, config, base)
    elif needs_critic(s.advantage):
        of_policy = reward is None or by_text or s.critic_init_from in ("policy", "scratch")
        critic = policy if of_policy else reward
    others = tuple(scorer_config(name, config, base) for name in s.other_reward_models)
    return Models(policy=policy, critic=critic, reward=reward, reads_text=by_text, others=others)


def scorer_config(name: str, config: Config, base: ModelConfig) -> ModelConfig:
    """The config of what `reward_model` or `critic_init_from` names; a reward model of this run has
    the lowest layers of the base model, as many as the config keeps."""
    folder = Path(split_step(name)[0])
    if has_critic(describe_stage(folder)):
        return dataclasses.replace(critic_config(folder), **computation(config.model))
    found = read_model_config(name, config.model) or base
    if str(folder) == "reward" and config.reward and config.reward.num_layers:
        return dataclasses.replace(found, num_layers=config.reward.num_layers)
    return found


def reads_text(config: Config, policy: ModelConfig, reward: ModelConfig) -> bool:
    """Whether the reward model cannot read the policy's tokens; by their numbers of tokens alone,
    where one of the two tokenizers is not here."""
    s, of_run = config.ppo, ("base", *STAGE_NAMES)
    origin = split_step(s.init_from)[0]
    if split_step(s.reward_model)[0] in of_run:
        return False
    path = config.model.path if origin in of_run else s.init_from
    known = path and not (origin in of_run and config.model.vocabulary_data)  # yet to be made
    writer, reader = local_spec(path, policy) if known else None, local_spec(s.reward_model, reward)
    if writer is None or reader is None:
        return reward.vocab_size < policy.vocab_size
    return bool(reread_reason(writer, reader))


def local_spec(name: str, config: ModelConfig) -> ModelSpec | None:
    """A model with its tokenizer, of a stage or a Hugging Face folder; None of any other."""
    folder = Path(name)
    if description := describe_stage(folder):
        tokenizer = load_tokenizer(folder / "tokenizer")
        return ModelSpec(kind=description["kind"], config=config, tokenizer=tokenizer)
    if not (folder / "tokenizer.json").is_file():
        return None
    raw = hf.read_config_json(folder)
    return ModelSpec(
        kind=hf.model_kind(raw),
        config=config,
        tokenizer=load_tokenizer(folder),
        padding_id=hf.padding_id(raw),
    )


def common_layers(config: Config, models: Models, other: str) -> int:
    """How many of the lowest layers the policy and another model share as PPO begins: those that
    the stages of the config do not train; 0 for a model from elsewhere."""
    configs = {"sft": models.policy}
    configs |= {"reward": models.reward} if models.reward else {}
    policy, scorer = (
        ancestors(config, split_step(name)[0], configs) for name in (config.ppo.init_from, other)
    )
    return max((min(policy[name], scorer[name]) for name in policy.keys() & scorer), default=0)


def ancestors(config: Config, name: str, configs: Mapping[str, ModelConfig]) -> dict[str, int]:
    """{model: how many of its lowest layers `name` shares} for itself and all it starts from."""
    depth = max(c.num_layers for c in configs.values())
    shared = {name: depth}
    while settings := name in configs and getattr(config, name):
        depth = min(depth, start_layer(configs[name], settings.trainable) or 0)
        name, _ = split_step(settings.init_from)
        shared[name] = depth
    return shared


def read_model_config(name: str, settings: ModelSettings) -> ModelConfig | None:
    """The config of a stage by its folder, or of a model; None where there is nothing yet."""
    name, _ = split_step(name)
    if name in ("base", *STAGE_NAMES):  # of the run itself, see `stage_folder.resolve`
        return None
    how = computation(settings)
    if description := describe_stage(Path(name)):
        return dataclasses.replace(stage_config(description), **how)
    if name in SHAPES:
        return published_config(name, **how)
    exists = os.path.exists(name) or name.startswith("package:")
    return hf.load_config(name, **how) if exists else None


def read_base_config(settings: ModelSettings) -> ModelConfig:
    """The config of `model`, with its whole vocabulary."""
    if scratch := settings.scratch:
        raw = llama_config(scratch, scratch.vocab_size, 0)
        return read_config(raw, **computation(settings))
    if config := read_model_config(settings.path, settings):
        return config
    raise ValueError(
        f"model.path must be a folder with a config.json, a .gguf file, 'package:NAME' or one of "
        f"{sorted(SHAPES)} to plan, got {settings.path!r}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One program of an iteration, and its analytic flops."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    max_trip_counts: TripCounts  # of its loops whose end depends on data
    flops: float  # of all devices together, with recomputation, see `flops`
    model_flops: float  # without recomputation, with plain attention


def phases(config: Config, models: Models, layouts: tuple[Layout, Layout]) -> list[Phase]:
    """Rollout, scoring and update of a config.

    Every program has all of the state and of the frozen parameters among its arguments, read or
    not: in a run they stay in memory all the time. What two networks share counts for each of them,
    as the compiler counts it.

    Args:
        config: the run.
        models: its models.
        layouts: of the updates, and of the rollout; their devices may be described ones.
    """
    s, layout = config.ppo, layouts[0]
    args = AbstractArguments(config, models, layouts)
    options = abstract_options(s)
    parts = dict(networks=args.networks, options=options)
    batch_sharding, replicated = layout.batch_sharding, layout.replicated
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, args.state)

    def trace(function, *inputs, **out):
        bound = functools.partial(function, **parts)
        function = jax.jit(bound, keep_unused=True, **out)
        return function.trace(args.state, args.hyperparameters, *inputs, frozen=args.frozen)

    rollout = trace(sample_responses, args.prompts, args.key, out_shardings=batch_sharding)
    inputs = [args.shard_rows(rollout.out_info)]
    programs = {"rollout": rollout}
    if needs_greedy(s.advantage):
        greedy = trace(greedy_responses, args.prompts, args.key, out_shardings=batch_sharding)
        programs["greedy rollout"] = greedy
        inputs.append(args.shard_rows(greedy.out_info))
    if not args.networks.reward:
        inputs = [(x, args.rows(jnp.float32, len(x.has_eos))) for x in inputs]
    scoring = trace(score, *inputs, out_shardings=(batch_sharding, replicated))
    experience = args.shard_rows(scoring.out_info[0])
    updates = trace(
        update, experience, args.key, donate_argnums=0, out_shardings=(state_shardings, replicated)
    )
    if models.reads_text:
        reader = functools.partial(
            score_text, reader=reward_network(models.reward, constrain=layout.constrain)
        )
        num_texts = s.rollout_batch_size + greedy_rows(s)
        shape = num_texts, text_width(s, models.reward)
        texts = args.rows(jnp.int32, *shape), args.rows(bool, *shape)
        programs["reward model"] = trace(reader, *texts, out_shardings=batch_sharding)
    programs |= {"scoring": scoring, "update": updates}
    flops = analytic_flops(s, models, args.starts, layout.constrain.platform)
    unchunked = dataclasses.replace(s, logits_chunk=0)
    model_flops = analytic_flops(unchunked, without_remat(models), args.starts)
    trip_counts: dict[str, TripCounts] = {
        "rollout": decode_trip_counts(s.rollout_batch_size, options.sampling),
        "update": s.num_micro_batches if s.packing else None,
    }
    if needs_greedy(s.advantage):
        sampling = greedy_options(options).sampling
        trip_counts["greedy rollout"] = decode_trip_counts(greedy_rows(s), sampling)
    return [
        Phase(
            name=name,
            lower=program.lower,
            max_trip_counts=trip_counts.get(name),
            flops=flops[name],
            model_flops=model_flops[name],
        )
        for name, program in programs.items()
    ]


def decode_trip_counts(num_rows: int, sampling: Sampling) -> TripCounts:
    """Of the decode loops, where every response has its full length."""
    slots, length = sampling.max_concurrent, sampling.response_length
    if slots == 0 or slots >= num_rows:
        return length
    return max_trip_counts(num_rows, slots, sampling.group(slots), length)


def score(state, hyperparameters, rollout, greedy=None, *, frozen, networks, options):
    """The work between the rollout and the updates. Responses come alone, or with their scores
    where no reward model is in the program."""

    def scored(responses):
        if isinstance(responses, tuple):
            return responses
        eos_id = options.score_eos
        scores = response_scores(responses, frozen=frozen, networks=networks, eos_id=eos_id)
        return responses, scores

    parts = dict(frozen=frozen, networks=networks, options=options)
    greedy = None if greedy is None else scored(greedy)
    return make_experience(*scored(rollout), state, hyperparameters, greedy=greedy, **parts)


def greedy_rows(settings: PPOSettings) -> int:
    """Greedy responses of an iteration."""
    if not needs_greedy(settings.advantage):
        return 0
    return settings.rollout_batch_size // settings.samples_per_prompt


def score_text(state, hyperparameters, tokens, mask, *, frozen, reader, **parts):
    """A reward model that reads text, on its own tokens."""
    return text_scores(reader, frozen.reward, tokens, mask)


def text_width(settings: PPOSettings, reward: ModelConfig) -> int:
    """Tokens that texts are padded to for a reward model that reads them, if it has as many for
    one as the policy."""
    longest = settings.max_prompt_length + settings.response_length
    return min(prompt_width(longest), reward.max_length)


def update(state, hyperparameters, experience, key, **parts):
    """`ppo_update` with its arguments in the order of the other two, and what an iteration then
    measures of the policy."""
    state, metrics = ppo_update(state, experience, hyperparameters, key, **parts)
    if hyperparameters.penalty_target_kl is not None:
        metrics["policy/old_kl"] = kl_of_update(state, experience, hyperparameters, **parts)
    return state, metrics


def abstract_options(settings: PPOSettings) -> PPOOptions:
    """With some stop token: which it is changes no program, and others besides it change little."""
    fields = {k: getattr(settings, k) for k in ("response_length", "top_k", "top_p", "min_p")}
    return make_options(settings, Sampling(eos_ids=(0,), **fields), eos_id=0)


class AbstractArguments:
    """The arguments of the programs, as shapes with shardings, and the networks in them."""

    def __init__(self, config: Config, models: Models, layouts: tuple[Layout, Layout]):
        s, self.layout = config.ppo, layouts[0]
        hyperparameters = make_hyperparameters(s)
        self.hyperparameters = jax.tree.map(
            lambda x: self.replicated(x.dtype, *x.shape), hyperparameters
        )
        self.key = self.replicated(jax.random.key(0).dtype)
        abstract_models = begin_abstract_models(config, models, self.layout)
        policy, reward, critic = abstract_models
        shared = functools.partial(planned_sharing, config, models, critic)
        in_program = None if models.reads_text else reward
        shapes = [m.config for m in (reward, *reward.others)] if in_program else []
        self.starts = network_starts(s, policy, in_program, critic, shared)
        policy, reward, critic = (m and m.config for m in (policy, in_program, critic))
        options = dict(logits_chunk=s.logits_chunk, value_bins=s.value_bins)
        networks = make_networks(policy, critic, reward, self.starts, layouts, **options)
        self.networks = with_ensemble(networks, s, shapes, layouts[0])

        def split(params: Sequence[Params]) -> tuple[FrozenParams, Params, Params]:
            pairs = zip(abstract_models, params, strict=True)
            filled = (m and dataclasses.replace(with_zeros(m), params=p) for m, p in pairs)
            return split_models(s, *filled, self.starts)

        def frozen(params: Sequence[Params]) -> FrozenParams:
            return jax.tree.map(lambda x: x.astype(config.model.frozen_dtype), split(params)[0])

        def state(params: Sequence[Params], hyperparameters: Hyperparameters) -> PPOState:
            return state_maker(s)(*split(params)[1:], hyperparameters)

        params = [m and m.params for m in abstract_models]
        self.frozen = abstract(self.layout, frozen, params)
        self.state = abstract(self.layout, state, params, hyperparameters)
        shape = s.rollout_batch_size // s.samples_per_prompt, s.max_prompt_length
        self.prompts = Prompts(tokens=self.rows(jnp.int32, *shape), mask=self.rows(bool, *shape))

    def shard_rows(self, outputs: Any) -> Any:
        """What a program returns of each response, as an argument of the next."""
        return jax.tree.map(lambda x: x.update(sharding=self.layout.batch_sharding), outputs)

    def rows(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.batch_sharding)

    def replicated(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.replicated)


def begin_abstract_models(
    config: Config, models: Models, layout: Layout
) -> tuple[Model, Model | None, Model | None]:
    """(policy, reward model, critic) as PPO begins, with shapes in place of parameters."""
    policy, reward = (
        c and Model(kind=kind, config=c, params=parameters_of(kind, c), tokenizer=None)
        for kind, c in (("policy", models.policy), ("reward", models.reward))
    )
    if models.others:
        shapes = [parameters_of("reward", c) for c in models.others]
        others = (
            Model(kind="reward", config=c, params=x, tokenizer=None)
            for c, x in zip(models.others, shapes, strict=True)
        )
        reward = dataclasses.replace(reward, others=tuple(others))
    settings = config.ppo
    if models.reads_text and models.critic is not None and not names_critic(settings):
        settings = dataclasses.replace(settings, critic_init_from="policy")
    named = None
    if names_critic(settings):
        params = parameters_of("reward", models.critic)
        named = Model(kind="reward", config=models.critic, params=params, tokenizer=None)
    return begin_models(settings, policy, reward, config.ppo_seed, layout, abstract, named)


def with_zeros(model: Model) -> Model:
    """A model whose others have zeros in place of shapes; for a program that is only traced."""

    def zeros(other: Model) -> Model:
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), other.params)
        return dataclasses.replace(other, params=params)

    return dataclasses.replace(model, others=tuple(map(zeros, model.others)))


def planned_sharing(
    config: Config, models: Models, critic: Model | None, policy: Model, other: Model
) -> int:
    """How many of the lowest layers two models will share, see `shared_layers`."""
    if other.params["embed"] is policy.params["embed"]:  # a critic on the policy's body
        return other.config.num_layers
    mine, own = (dataclasses.replace(x.config, num_layers=1) for x in (policy, other))
    named = other is critic and names_critic(config.ppo)
    name = config.ppo.critic_init_from if named else config.ppo.reward_model
    return common_layers(config, models, name) if mine == own else 0


def without_remat(models: Models) -> Models:
    plain = {
        name: config and dataclasses.replace(config, remat="none")
        for name, config in vars(models).items()
        if name not in ("reads_text", "others")
    }
    others = tuple(dataclasses.replace(config, remat="none") for config in models.others)
    return dataclasses.replace(models, **plain, others=others)


def analytic_flops(
    settings: PPOSettings,
    models: Models,
    starts: Sequence[int | None] = (None,) * 3,
    platform: str | None = None,
) -> dict[str, float]:
    """What each phase should compute, on all devices together.

    Args:
        settings: the ppo section.
        models: the run's models.
        starts: the layers at which policy, critic and reward model start above the trunk.
        platform: of the devices, whose attention kernel it is, see `kernels.kernel_of`.
    """
    s, policy, critic = settings, models.policy, models.critic
    sizes = dict(
        sequences=s.rollout_batch_size,
        prompt_length=s.max_prompt_length,
        response_length=s.response_length,
    )
    kernels = dict(logits_chunk=s.logits_chunk, platform=platform)
    trunks = [start or 0 for start in starts]
    trained = [trained_parts(policy, s.trainable, trunks[0], s.lora, "logits")]
    passes = 2 if s.old_logprobs == "recompute" else 1
    adapters = (passes - 1) * policy.num_layers * trained[0].adapter_flops
    if critic is not None:
        trained.append(trained_parts(critic, s.value_trainable, trunks[1], s.lora, "scalar"))
        adapters += critic.num_layers * trained[1].adapter_flops
    positions = s.rollout_batch_size * (s.max_prompt_length + s.response_length - 1)
    reward = None if models.reads_text else models.reward
    kernels |= dict(value_outputs=s.value_bins or 1, num_critics=s.num_critics)
    scoring = scoring_flops(
        policy, critic, reward, policy_passes=passes, trunks=trunks, **kernels, **sizes
    )
    count = greedy_rows(s)
    greedy = sizes | dict(sequences=count)
    if count and reward is not None:
        how = dict(policy_passes=0, trunks=trunks)
        scoring += scoring_flops(policy, None, reward, **how, **kernels, **greedy)
    for config in () if s.reward_rule == AVERAGE else models.others:
        scoring += forward_flops(
            config,
            sequences=s.rollout_batch_size,
            positions=s.max_prompt_length + s.response_length,
            attended=attended_in_row(config, s.max_prompt_length + s.response_length, platform),
            outputs=1,
            head="scalar",
            platform=platform,
        )
    flops = {
        "rollout": rollout_flops(
            policy,
            samples_per_prompt=s.samples_per_prompt,
            slots=s.max_concurrent,
            group=abstract_options(s).sampling.group(s.max_concurrent),
            **sizes,
        ),
        "scoring": scoring + positions * adapters,
        "update": update_flops(
            policy,
            critic,
            num_epochs=s.num_epochs,
            value_updates=s.value_updates,
            trained=trained,
            **kernels,
            **sizes | {"sequences": s.update_batch_size},
        ),
    }
    if s.penalty_target_kl > 0:
        updated = sizes | {"sequences": s.update_batch_size}
        flops["update"] += scoring_flops(policy, None, None, trunks=trunks, **kernels, **updated)
    if count:
        slots = min(s.max_concurrent or count, count)
        group = greedy_options(abstract_options(s)).sampling.group(slots)
        flops["greedy rollout"] = rollout_flops(policy, slots=slots, group=group, **greedy)
    if models.reads_text:
        width = text_width(s, models.reward)
        flops["reward model"] = forward_flops(
            models.reward,
            sequences=s.rollout_batch_size + count,
            positions=width,
            attended=attended_in_row(models.reward, width, platform),
            outputs=1,
            head="scalar",
            platform=platform,
        )
    return flops


def trained_parts(
    config: ModelConfig, trainable: str | int, trunk: int, lora: LoRASettings, head: str
) -> TrainedParts:
    """What has gradients in a network above a trunk; its head gives "logits" or a "scalar"."""
    if trainable == "lora":
        adapters, of_keys = (
            adapter_flops(config, targets, lora.rank)
            for targets in (lora.targets, sorted({"key", "value"} & set(lora.targets)))
        )
        return TrainedParts(
            adapter_flops=adapters, key_adapter_flops=of_keys, head=head == "scalar"
        )
    frozen = (start_layer(config, trainable) or 0) - trunk
    frozen_head = head == "logits" and config.tie_embeddings and trainable != "all"
    return TrainedParts(trunk=trunk, frozen_layers=frozen, head=not frozen_head)
