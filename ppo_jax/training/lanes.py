"""PPO of several runs as one program: the lanes of a sweep, which differ in numbers alone.

A lane is an ordinary run: what it writes into its folder can be resumed alone, exported, evaluated.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax.algorithms.greedy import greedy_responses
from ppo_jax.algorithms.references import reference_responses
from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.algorithms.sweep import (
    LaneAxes,
    split_lanes,
    stack_frozen,
    sweep_iteration,
    sweep_responses,
    sweep_scores,
    sweep_update,
)
from ppo_jax.config.ppo import LEFT_OUT
from ppo_jax.config.run import Config
from ppo_jax.config.stages import OptimizerSettings
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState, Prompts
from ppo_jax.data.encode import take_prompts
from ppo_jax.data.prompts import PromptData
from ppo_jax.distributed.layout import LaneLayout, make_layouts, over_lanes
from ppo_jax.io.critics import keep_critic, load_critic
from ppo_jax.io.run_folder import without_workdir
from ppo_jax.io.stage_folder import Model, load_source, resolve, split_step
from ppo_jax.training.common import compile_step, freeze
from ppo_jax.training.greedy import make_greedy
from ppo_jax.training.lane_runs import LaneRuns
from ppo_jax.training.ppo import (
    Scorer,
    function_scorer,
    make_buckets,
    open_ppo,
    ppo_run,
    program_options,
    sample_rows,
    tell_settings,
    tell_what_comes,
)
from ppo_jax.training.ppo_evaluation import sampler_options
from ppo_jax.training.ppo_models import find_models
from ppo_jax.training.ppo_setup import (
    Setup,
    make_hyperparameters,
    setup_of,
    split_models,
    starts_of,
    state_maker,
)
from ppo_jax.training.references import make_references
from ppo_jax.training.resume import fingerprint
from ppo_jax.training.reward_functions import load_reward_functions
from ppo_jax.training.text_rewards import text_scorer

# What lanes of one program may differ in: the numbers of an iteration, and what the host compares.
NUMBERS = {field.name for field in dataclasses.fields(Hyperparameters)}
NUMBERS -= {"optimizer", "value_optimizer"}
NUMBERS |= {"seed", "max_ref_kl"}
OPTIMIZER_NUMBERS = {field.name for field in dataclasses.fields(OptimizerSettings)} - {"schedule"}


class Lane(NamedTuple):
    """One run: what `train_ppo` is given."""

    config: Config
    workdir: Path
    base: str  # path of the base model
    data: PromptData


class Program(NamedTuple):
    """What the iterations of all lanes need besides their states."""

    setup: Setup  # of all lanes; its hyperparameters and stacked frozen leaves have an axis of them
    axes: LaneAxes
    layout: LaneLayout
    num_lanes: int


def shape_of(config: Config, workdir: Path) -> str:
    """What the lanes of one program have in common: the config without the numbers, as a text.

    Of the numbers, those of `LEFT_OUT` count as they are in the program or not.
    """
    values = without_workdir(dataclasses.asdict(config), workdir)
    ppo = values["ppo"]
    left_out = {f"without {name}": ppo[name] == value for name, value in LEFT_OUT.items()}
    left_out |= {"critic_has_optimizer": config.ppo.critic_has_optimizer}
    values.pop("seed")
    values["ppo"] = {name: x for name, x in ppo.items() if name not in NUMBERS} | left_out
    for section in ("optimizer", "value_optimizer"):
        numbers = values["ppo"][section]
        values["ppo"][section] = {k: x for k, x in numbers.items() if k not in OPTIMIZER_NUMBERS}
    return json.dumps(values, sort_keys=True, default=str)


def groups_of_shape(points: Sequence[tuple[Config, Path]]) -> list[list[int]]:
    """Which points are one program, in their order: those of one shape."""
    groups: dict[str, list[int]] = {}
    for number, (config, workdir) in enumerate(points):
        groups.setdefault(shape_of(config, workdir), []).append(number)
    return list(groups.values())


def train_lanes(lanes: Sequence[Lane]) -> dict[Path, str]:
    """`train_ppo` of several runs as one program.

    Args:
        lanes: of one shape, see `groups_of_shape`, that can go on together, see `go_together`.

    Returns:
        {workdir: why} of the lanes that have failed: their loss was not finite, or their brake
        ended them. The others are complete.

    Raises:
        ValueError: they are not of one shape or of one data set.
        FloatingPointError: all of them have failed.
    """
    check_lanes(lanes)
    config, data = lanes[0].config, lanes[0].data
    settings = config.ppo
    layout = over_lanes(make_layouts(config.mesh), len(lanes))
    buckets = [make_buckets(settings, data.prompts, lane.config.ppo_seed) for lane in lanes]
    program, starts, reward, tokenizer = begin(lanes, layout)
    print(table_of(program, lanes, starts), flush=True)
    tell_settings(settings, buckets[0])
    score = make_scorer(program, lanes, reward, tokenizer)
    samples = make_samplers(program, lanes[0], tokenizer, score)
    numbers = [make_hyperparameters(lane.config.ppo) for lane in lanes]
    runs = LaneRuns([ppo_run(x.config, x.workdir, len(lanes)) for x in lanes], layout)
    seeds = [lane.config.ppo_seed for lane in lanes]
    with runs:
        args = [(*start, own) for start, own in zip(starts, numbers, strict=True)]
        states = runs.restore(state_maker(settings), args)
        del starts, args
        iterate = make_iteration(program, states, score)
        hyperparameters = program.setup.hyperparameters
        tell_what_comes(runs.start, settings, Path("samples.jsonl of each lane"))
        if runs.start == 0:
            runs.append_samples(samples(states, hyperparameters, 0))
        replaced: set[int] = set()
        for i in runs.steps():
            inputs, chosen, width = inputs_of(i, buckets, seeds, program, data, settings)
            states, metrics = iterate(states, hyperparameters, chosen, *inputs)
            if settings.prompt_buckets > 1:
                metrics |= {"ppo/prompt_width": width}
            if (i + 1) % settings.sample_every == 0 or i + 1 == settings.num_iterations:
                runs.finish_step()
                runs.append_samples(samples(states, hyperparameters, i + 1))
            runs.end_step(i + 1, states, metrics)
            for lane in runs.failed.keys() - replaced if runs.alive else ():
                states, hyperparameters = copy_lane((states, hyperparameters), lane, runs.alive[0])
                replaced.add(lane)
    if not runs.alive:
        raise FloatingPointError(f"all lanes failed; the last: {list(runs.failed.values())[-1]}")
    return {lanes[i].workdir: why for i, why in runs.failed.items()}


def check_lanes(lanes: Sequence[Lane]):
    """The lanes are of one shape and of one data set.

    Raises:
        ValueError: they are not.
    """
    if len(groups_of_shape([(lane.config, lane.workdir) for lane in lanes])) > 1:
        names = sorted(NUMBERS | {f"optimizer.{x}" for x in OPTIMIZER_NUMBERS})
        raise ValueError(
            f"lanes of one program differ in seed and in these of ppo alone: {', '.join(names)}"
        )
    if lanes[0].config.ppo.evaluate_every:
        every = lanes[0].config.ppo.evaluate_every
        raise ValueError(f"ppo.evaluate_every must be 0 in lanes of one program, got {every}")
    if (most := lanes[0].config.ppo.max_rollouts) > 1:
        raise ValueError(f"ppo.max_rollouts must be 1 in lanes of one program, got {most}")
    if any(fingerprint(lane.data) != fingerprint(lanes[0].data) for lane in lanes):
        raise ValueError("lanes of one program have the same prompts, these have others")


def begin(lanes: Sequence[Lane], layout: LaneLayout):
    """Load the models of all lanes, each once, and begin their stages.

    Returns:
        (program, each lane's (trained leaves of the policy, of the critic or None), the reward
        model or None, tokenizer). Models are shared by their folders and steps, and of what is
        left each array whose numbers are those of all lanes.
    """
    inner, loaders = layout.layouts[0], (load_once(load_source), load_once(load_critic))
    settings, dtype = lanes[0].config.ppo, lanes[0].config.model.frozen_dtype
    frozen, trained, places = [], [], []
    for config, workdir, base, data in lanes:
        models = find_models(config, workdir, base, inner, *loaders)
        places.append(starts_of(settings, *models))
        own, policy, critic = split_models(settings, *models, places[-1])
        frozen.append(own)
        trained.append((inner.shard_params(policy), critic and inner.shard_params(critic)))
        open_ppo(config, workdir, *models, data)
        if models[2] is not None:
            kept = (models[2].config, own.value, places[-1][1])
            keep_critic(workdir / "ppo", *kept, shared=settings.shared_critic)
    if len(set(places)) > 1:
        raise ValueError(
            f"lanes of one program share as many layers with their reward models; got {places}"
        )
    stacked, axes = share(freeze(frozen, inner, dtype), layout)
    setup = setup_of(
        settings, *models, layout.layouts, starts=places[0], frozen=stacked, merge_adapters=False
    )
    numbers = [make_hyperparameters(lane.config.ppo) for lane in lanes]
    numbers = jax.tree.map(lambda *x: np.stack(x), *numbers)
    setup = dataclasses.replace(
        setup, hyperparameters=layout.put_stacked(numbers, inner.replicated)
    )
    one_seed = len({lane.config.ppo_seed for lane in lanes}) == 1
    axes = LaneAxes(
        inputs=None if one_seed else 0,
        frozen=axes,
        mesh_axis=layout.mesh_axis,
        at_once=lanes_at_once(layout, trained[0][0], axes, stacked),
    )
    program = Program(setup, axes, layout, len(lanes))
    reward = models[1] and dataclasses.replace(models[1], params={})
    return program, trained, reward, models[0].tokenizer


def lanes_at_once(
    layout: LaneLayout, trained: Params, axes: FrozenParams, frozen: FrozenParams
) -> int | None:
    """How many lanes are computed side by side; None: all of them.

    A CPU gains from that where most of a policy is frozen and there once, for the lanes' products
    with it are one. Else the lanes take turns, one on each device, which is as fast and needs the
    memory of one (`experiments/benchmark.py lanes --at_once=1`).
    """
    mesh = layout.layouts[0].mesh
    own = sum(x.nbytes for x in jax.tree.leaves(trained))
    shared = jax.tree.map(
        lambda axis, x: 0 if axis == 0 else sum(leaf.nbytes for leaf in jax.tree.leaves(x)),
        (axes.policy, axes.trunk),
        (frozen.policy, frozen.trunk),
        is_leaf=lambda axis: axis is None,
    )
    if mesh.devices.flat[0].platform != "cpu" or own < sum(jax.tree.leaves(shared)):
        return None
    return mesh.shape[layout.mesh_axis] if layout.mesh_axis else 1


def table_of(program: Program, lanes: Sequence[Lane], starts: Sequence[tuple]) -> str:
    """Lines on what the lanes share, and on their memory, in the form of the table of a run."""
    own = frozenset().union(*(numbers_of(x.config) ^ numbers_of(lanes[0].config) for x in lanes))
    differ = sorted({name for name, _ in own})
    frozen, axes = program.setup.frozen, program.axes.frozen
    parts = {f.name: getattr(frozen, f.name) for f in dataclasses.fields(frozen)}
    named = {"ref_policy": "reference", "reward": "reward model"}
    named |= {"policy": "what is frozen of the policy", "value": "what is frozen of the critic"}
    shared = [
        named.get(name, name)
        for name, part in parts.items()
        if jax.tree.leaves(part) and not jax.tree.leaves(getattr(axes, name))
    ]
    once: dict[int, int] = {}

    def count(axis, leaf):  # of what is not there, both are None
        once.update({id(x): x.nbytes for x in jax.tree.leaves(leaf) if axis is None})

    jax.tree.map(count, axes, frozen, is_leaf=lambda x: x is None)
    stacked = sum(x.nbytes for x in jax.tree.leaves(frozen) if id(x) not in once)
    state = 3 * sum(x.nbytes for x in jax.tree.leaves(starts[0]))
    if lanes[0].config.ppo.reference_moves:
        state += sum(x.nbytes for x in jax.tree.leaves(starts[0][0]))
    each = state + stacked // len(lanes)
    rows = [
        ("lanes", f"{len(lanes)} as one program, which differ in {', '.join(differ) or 'nothing'}"),
        ("lanes at once", f"{program.axes.at_once or len(lanes)}"),
        ("lanes share", ", ".join(shared) or "no model"),
        ("memory, shared", f"{sum(once.values()) / 1e6:.1f} MB"),
        ("memory, lanes", f"{len(lanes)} x {each / 1e6:.1f} MB, each with Adam's two moments"),
    ]
    return "\n".join(f"  {label:<20}  {value}" for label, value in rows)


def numbers_of(config: Config) -> frozenset[tuple[str, Any]]:
    """The (name, value) of all that lanes may differ in."""
    ppo = config.ppo
    optimizer = {(f"optimizer.{x}", getattr(ppo.optimizer, x)) for x in OPTIMIZER_NUMBERS}
    optimizer |= {
        (f"value_optimizer.{x}", getattr(ppo.value_optimizer, x))
        for x in OPTIMIZER_NUMBERS - {"learning_rate"}
    }
    numbers = {(name, getattr(ppo, name)) for name in NUMBERS}
    return frozenset(numbers | optimizer | {("run's seed", config.seed)})


def load_once(load_source: Callable[..., Model]) -> Callable[..., Model]:
    """`load_source`, or `load_critic`, that reads a folder's step once, however many lanes start
    from it."""
    loaded: dict[tuple, Model] = {}

    def load(name: str, workdir: Path, base: str, step: int | None = None, **how: Any) -> Model:
        source = Path(resolve(name, workdir, base)).resolve(), split_step(name)[1], step
        if source not in loaded:
            loaded[source] = load_source(name, workdir, base, step=step, **how)
        return loaded[source]

    return load


def share(frozen: Sequence[FrozenParams], layout: LaneLayout) -> tuple[FrozenParams, FrozenParams]:
    """`stack_frozen`, with stacked leaves sharded over the lanes."""
    stacked, axes = stack_frozen(frozen)
    shardings = layout.stacked(layout.layouts[0].shardings(frozen[0]))

    def put(axis, leaf, sharding):
        return leaf if axis is None else jax.device_put(leaf, sharding)

    put_all = jax.tree.map(put, axes, stacked, shardings, is_leaf=lambda x: x is None)
    return put_all, axes


@functools.partial(jax.jit, donate_argnums=0)
def copy_lane(tree: Any, lane: int, other: int) -> Any:
    """A lane that has failed goes on as a copy of another: what it computes is finite, and nobody
    reads it."""
    return jax.tree.map(lambda x: x.at[lane].set(x[other]), tree)


def inputs_of(step, buckets, seeds, program: Program, data: PromptData, settings):
    """((prompts, key), the prompt of each response [N B], the widths of the prompts [N]).

    Lanes of one seed have the same prompts, and they are there once.
    """
    inner, each = program.layout.layouts[0], settings.samples_per_prompt
    drawn = [own.batch(step) for own in buckets]
    widths = np.array([width for _, width in drawn])
    rows = [take_prompts(data.prompts, chosen, max(widths)) for chosen, _ in drawn]
    chosen = np.concatenate([chosen.repeat(each) for chosen, _ in drawn])
    if program.axes.inputs is None:
        return (inner.shard_batch(rows[0]), inner.key(seeds[0], step)), chosen, widths
    prompts = jax.tree.map(lambda *x: np.stack(x), *rows)
    prompts = program.layout.put_stacked(prompts, inner.batch_sharding)
    fold = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))
    keys = program.layout.put_stacked(fold(np.array(seeds)), inner.replicated)
    return (prompts, keys), chosen, widths


def make_iteration(program: Program, states: PPOState, score: Scorer | None):
    """`training.ppo.make_iteration` of all lanes: (states, numbers, chosen prompts, their tokens,
    keys) -> (states, metrics [N])."""
    setup, axes, layout = program.setup, program.axes, program.layout
    parts = dict(networks=setup.networks, options=setup.options, axes=axes)
    how = program_options(setup.options)
    compiled = functools.partial(
        compile_step, state=states, layout=layout.layouts[0], compiler_options=how, **parts
    )
    if score is None:
        iteration = compiled(sweep_iteration)
        return lambda states, numbers, chosen, *inputs: iteration(
            states, numbers, *inputs, frozen=setup.frozen
        )
    sample = jax.jit(
        functools.partial(sweep_responses, **parts),
        out_shardings=layout.batch_sharding,
        compiler_options=how,
    )
    greedy_sample, reference_sample = (
        jax.jit(
            functools.partial(sweep_responses, sample=other, **parts),
            out_shardings=layout.batch_sharding,
            compiler_options=how,
        )
        for other in (greedy_responses, reference_responses)
    )
    greedy = make_greedy(setup.options, greedy_sample, score)
    references = make_references(setup.options, reference_sample, score)
    update = compiled(sweep_update)
    split = jax.random.split if axes.inputs is None else jax.vmap(jax.random.split, out_axes=1)

    def iterate(states, numbers, chosen: np.ndarray, prompts: Prompts, keys: jax.Array):
        rollout_keys, shuffle_keys = split(keys)
        rollout = sample(states, numbers, prompts, rollout_keys, frozen=setup.frozen)
        scores, more = score(chosen, rollout)
        inputs = (chosen, states, numbers, prompts, rollout_keys)
        others = (other(*inputs, frozen=setup.frozen) for other in (greedy, references))
        states, metrics = update(
            states, numbers, rollout, scores, shuffle_keys, *others, frozen=setup.frozen
        )
        each = {name: split_lanes(np.asarray(x), program.num_lanes) for name, x in more.items()}
        return states, metrics | {k: x.mean(axis=1, dtype=np.float64) for k, x in each.items()}

    return iterate


def make_scorer(
    program: Program, lanes: Sequence[Lane], reward: Model | None, tokenizer: Any
) -> Scorer | None:
    """The scores of the responses of all lanes at once; None where they are in the program."""
    setup, data, layout = program.setup, lanes[0].data, program.layout
    if functions := load_reward_functions(lanes[0].config.ppo):
        patient = [dataclasses.replace(f, seconds=f.seconds * len(lanes)) for f in functions]
        stop_ids = setup.options.sampling.eos_ids
        return function_scorer(patient, data, tokenizer, stop_ids, layout)
    if setup.text_reward is None:
        return None
    in_axes = (None if program.axes.frozen is None else program.axes.frozen.reward, 0, 0)

    def scores_of(network, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        rows = split_lanes((tokens, mask), program.num_lanes)
        score = functools.partial(text_scores, network)
        mapped = jax.vmap(score, in_axes, spmd_axis_name=program.axes.mesh_axis)
        return mapped(params, *rows).reshape(-1)

    return text_scorer(setup, reward, data.texts, tokenizer, layout, scores_of)


def make_samplers(program: Program, lane: Lane, tokenizer: Any, score: Scorer | None):
    """`training.ppo.make_sampler` of all lanes: (states, numbers, step) -> rows of each lane."""
    setup, inner, data = program.setup, program.layout.layouts[0], lane.data
    count, lanes = min(lane.config.ppo.num_samples, len(data.texts)), program.num_lanes
    filled, options = inner.pad_batch(np.arange(count)), sampler_options(setup.options)
    axes = dataclasses.replace(program.axes, inputs=None)
    parts = dict(networks=setup.networks, axes=axes)
    sample = jax.jit(
        functools.partial(sweep_responses, options=options, **parts),
        out_shardings=program.layout.batch_sharding,
    )
    read = dict(eos_id=setup.options.score_eos, num_lanes=lanes)
    score_tokens = jax.jit(functools.partial(sweep_scores, **read, **parts))

    def samples(states: PPOState, numbers: Hyperparameters, step: int) -> list[list[dict]]:
        if not count:
            return [[]] * lanes
        prompts = inner.shard_batch(take_prompts(data.prompts, filled))
        key = inner.replicate(jax.random.key(0))
        rollout = sample(states, numbers, prompts, key, frozen=setup.frozen)
        chosen = np.tile(filled, lanes)
        if score is None:
            scores = score_tokens(rollout, frozen=setup.frozen)
        else:
            scores, _ = score(chosen, rollout)
        stop_ids = options.sampling.eos_ids
        rows = sample_rows(data, chosen, rollout, scores, tokenizer, stop_ids, step)
        return [rows[i * len(filled) :][:count] for i in range(lanes)]

    return samples
