"""The programs of one PPO iteration over abstract arrays: rollout, scoring, update.

They call the functions of the training loop; with a reward model the loop compiles all three as
one, so that a plan's memory is an estimate of it. Their arguments are shapes with shardings, so
that they compile for devices that are not there.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.adaptation import moved_reference
from ppo_jax.algorithms.experience import (
    make_experience,
    reference_logprobs,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.greedy import greedy_responses
from ppo_jax.algorithms.ppo import kl_of_update, update_from_rollout
from ppo_jax.algorithms.references import reference_responses
from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.config.ppo import PPOSettings, names_critic
from ppo_jax.config.run import Config
from ppo_jax.core.grouped import BLOCKS
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState, Prompts
from ppo_jax.distributed.layout import Layout, abstract
from ppo_jax.io.model_spec import parameters_of
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import reward_network
from ppo_jax.planner.hlo.trip_counts import TripCounts
from ppo_jax.planner.iteration import analytic_flops
from ppo_jax.planner.models import Models, common_layers
from ppo_jax.planner.passes import (
    networks_in_common,
    num_other_responses,
    other_rollouts,
    text_width,
)
from ppo_jax.rollout.continuous_batching import max_trip_counts
from ppo_jax.rollout.decode import max_steps
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo_setup import (
    abstract_options,
    begin_models,
    make_hyperparameters,
    make_networks,
    network_starts,
    split_models,
    state_maker,
    with_ensemble,
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
    programs = trace_programs(config, models, args)
    shards = dict(shards=layout.num_shards("batch"), devices=layout.constrain.num_devices)
    flops = analytic_flops(s, models, args.starts, layout.constrain.platform, **shards)
    once = dict(again=False, **shards)
    model_flops = analytic_flops(s, without_remat(models), args.starts, **once)
    trip_counts = max_trips(s, models, layouts, trunk=args.networks.trunk is not None)
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


def trace_programs(
    config: Config, models: Models, args: "AbstractArguments"
) -> dict[str, jax.stages.Traced]:
    """The program of each phase."""
    s, layout = config.ppo, args.layout
    parts = dict(networks=args.networks, options=abstract_options(s))
    batch_sharding, replicated = layout.batch_sharding, layout.replicated
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, args.state)

    def trace(function, *inputs, **out):
        bound = functools.partial(function, **parts)
        function = jax.jit(bound, keep_unused=True, **out)
        return function.trace(args.state, args.hyperparameters, *inputs, frozen=args.frozen)

    rollout = trace(sample_responses, args.prompts, args.key, out_shardings=batch_sharding)
    inputs = [args.shard_rows(rollout.out_info)]
    programs, others = {"rollout": rollout}, other_rollouts(s)
    for name, sample in (("greedy", greedy_responses), ("reference", reference_responses)):
        if name not in others:
            inputs.append(None)
            continue
        program = trace(sample, args.prompts, args.key, out_shardings=batch_sharding)
        programs[f"{name} rollout"] = program
        inputs.append(args.shard_rows(program.out_info))
    if not args.networks.reward:
        inputs = [x and (x, args.rows(jnp.float32, len(x.has_eos))) for x in inputs]
    out = dict(donate_argnums=0, out_shardings=(state_shardings, replicated))
    if networks_in_common(s):
        scoring = trace(score_alone, *inputs, out_shardings=batch_sharding)
        updates = trace(update_from_scores, *after_scoring(args, inputs, scoring), args.key, **out)
    else:
        scoring = trace(score, *inputs, out_shardings=(batch_sharding, replicated))
        experience = args.shard_rows(scoring.out_info[0])
        updates = trace(update, experience, args.key, **out)
    if models.reads_text:
        constrain = layout.constrain
        reader = functools.partial(
            score_text, reader=reward_network(models.reward, constrain=constrain)
        )
        num_texts = s.rollout_batch_size + num_other_responses(s)
        shape = num_texts, text_width(s, models.reward)
        texts = args.rows(jnp.int32, *shape), args.rows(bool, *shape)
        programs["reward model"] = trace(reader, *texts, out_shardings=batch_sharding)
    return programs | {"scoring": scoring, "update": updates}


def after_scoring(
    args: "AbstractArguments", inputs: Sequence[Any], scoring: Any
) -> tuple[list, Any]:
    """What `score_alone` leaves: (each rollout with its scores, log-probs of the reference)."""
    scores, ref_logprobs = args.shard_rows(scoring.out_info)
    responses = [x[0] if isinstance(x, tuple) else x for x in inputs]
    return [x and (x, own) for x, own in zip(responses, scores, strict=True)], ref_logprobs


def max_trips(
    settings: PPOSettings, models: Models, layouts: tuple[Layout, Layout], *, trunk: bool
) -> dict[str, TripCounts]:
    """Of the loops of each phase whose trips the data decide. Experts are taken to be chosen alike:
    each device has its share of the rows."""
    s, sampling = settings, abstract_options(settings).sampling
    counts: dict[str, TripCounts] = {"update": s.num_micro_batches if s.packing else None}
    rollouts = {f"{name} rollout": other for name, other in other_rollouts(s).items()}
    for name, own in ({"rollout": (s.rollout_batch_size, sampling)} | rollouts).items():
        counts[name] = decode_trip_counts(*own, trunk)
    networks = (models.policy, models.critic, models.reward, *models.others)
    experts = {c.experts.num_experts for c in networks if c is not None and c.experts}
    if not experts:
        return counts
    for name in ("scoring", "reward model", *counts):
        layout, known = layouts["rollout" in name], counts.get(name)
        known = {} if known is None else known
        known = known if isinstance(known, Mapping) else {"": known}
        shares = (layout.constrain.shard_shape(("expert",), (n,))[0] / n for n in experts)
        counts[name] = {**known, BLOCKS: max(shares)}
    return counts


def decode_trip_counts(num_rows: int, sampling: Sampling, trunk: bool) -> TripCounts:
    """Of the decode loops, where every response has its full length."""
    slots, steps = sampling.max_concurrent, max_steps(sampling.response_length, trunk)
    if slots == 0 or slots >= num_rows:
        return steps
    return max_trip_counts(num_rows, slots, sampling.group(slots), steps)


def score(
    state, hyperparameters, rollout, greedy=None, references=None, *, frozen, networks, options
):
    """The work between the rollout and the updates. Responses come alone, or with their scores
    where no reward model is in the program."""
    scored = functools.partial(with_scores, frozen=frozen, networks=networks, options=options)
    parts = dict(frozen=moved_reference(frozen, state), networks=networks, options=options)
    references = scored(references, samples=options.reference_responses)
    others = dict(greedy=scored(greedy, samples=1), references=references)
    return make_experience(*scored(rollout), state, hyperparameters, **others, **parts)


def score_alone(
    state,
    hyperparameters,
    rollout,
    greedy=None,
    references=None,
    *,
    frozen: FrozenParams,
    networks,
    options,
) -> tuple[list[jax.Array | None], jax.Array]:
    """`score` without what the update computes: (scores of each of the responses, log-probs of the
    reference)."""
    scored = functools.partial(with_scores, frozen=frozen, networks=networks, options=options)
    responses, scores = scored(rollout)
    reference = dict(frozen=moved_reference(frozen, state), networks=networks)
    reference |= dict(samples_per_prompt=options.sampling.samples_per_prompt)
    others = (greedy, 1), (references, options.reference_responses)
    found = [other and scored(other, samples=count)[1] for other, count in others]
    return [scores, *found], reference_logprobs(responses, hyperparameters, **reference)


def with_scores(responses, *, frozen, networks, options, samples=None):
    """(responses, their scores), if there are any; those that have come with their scores as they
    are. `samples` to each prompt, None is as many as of the policy's."""
    if responses is None or isinstance(responses, tuple):
        return responses
    how = dict(eos_id=options.score_eos)
    how |= dict(samples_per_prompt=samples or options.sampling.samples_per_prompt)
    return responses, response_scores(responses, frozen=frozen, networks=networks, **how)


def score_text(state, hyperparameters, tokens, mask, *, frozen, reader, **parts):
    """A reward model that reads text, on its own tokens."""
    return text_scores(reader, frozen.reward, tokens, mask)


def update(state, hyperparameters, experience, key, **parts):
    """`ppo_update` with its arguments in the order of the other two, and what an iteration then
    measures of the policy."""
    state, metrics = ppo_update(state, experience, hyperparameters, key, **parts)
    if hyperparameters.penalty_target_kl is not None:
        metrics["policy/old_kl"] = kl_of_update(state, experience, hyperparameters, **parts)
    return state, metrics


def update_from_scores(state, hyperparameters, scored, ref_logprobs, key, **parts):
    """All that follows the scores, where the update makes passes that scoring needs."""
    (rollout, scores), *others = scored
    given = (state, hyperparameters, rollout, scores, key, *others)
    return update_from_rollout(*given, ref_logprobs=ref_logprobs, **parts)


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
        options |= dict(shared_critic=s.shared_critic)
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
