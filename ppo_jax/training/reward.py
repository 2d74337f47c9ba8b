"""The loop of reward-model training."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.supervised import reward_step, text_scores
from ppo_jax.config.run import Config
from ppo_jax.config.stages import RewardSettings
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import Params, PreferenceBatch, TrainState
from ppo_jax.data.comparisons import RewardData, reward_data
from ppo_jax.data.encode import TokenizedTexts, encode_demonstrations, with_dropped
from ppo_jax.data.hidden_states import TRUNK_ROW, Inputs, batch_width
from ppo_jax.data.messages import count_left_out
from ppo_jax.data.packing import best_fit
from ppo_jax.data.readers import naming_data
from ppo_jax.data.records import load_texts
from ppo_jax.data.shared_states import FOLDER, SharedStates
from ppo_jax.distributed.layout import Layout, fetch, make_layouts
from ppo_jax.inference.score import all_scores
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.io.stage_folder import Model, load_source, source_steps
from ppo_jax.models.build import reward_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.partition import keep_layers
from ppo_jax.training.common import (
    compile_step,
    count_steps,
    freeze,
    init_train_state,
    inputs_reader,
    make_optimizer,
    shared_states,
    with_adapters,
)
from ppo_jax.training.resume import fingerprint
from ppo_jax.training.stage import Stage, open_stage, stage_run

ROWS = 2  # packed batches have a multiple of so many rows

# To train on, to validate on, and to score 0 on average: None is the second.
RewardParts = tuple[RewardData, RewardData, TokenizedTexts | None]


def read_reward(config: Config, start: ModelSpec) -> RewardParts:
    settings, context = config.reward, start.config.max_length
    train, unseen = reward_data(settings, config.seed, start.tokenizer, context)
    return train, unseen, reference_texts(settings, start.tokenizer)


def train_reward(config: Config, workdir: Path, base: str, data: RewardParts):
    """Train a reward model; the result is the stage folder `workdir/reward`.

    After the last step the head's bias is set so that the reference texts score 0 on average.
    """
    settings, (layout, _) = config.reward, make_layouts(config.mesh)
    pin = source_steps(workdir / "reward").get("init_from")
    model = load_source(settings.init_from, workdir, base, config.model, layout, pin)
    comparisons, unseen, references = data
    num_steps = count_steps(settings, comparisons.num_rows)
    model = init_reward_model(model, settings.num_layers, config.seed)
    model = with_adapters(model, settings.trainable, settings.lora, config.seed, layout)
    about = dict(data=fingerprint(comparisons), sources={"init_from": model})
    start, parts = open_stage(REWARD, config, workdir, model, num_steps=num_steps, **about)
    network = reward_network(model.config, start_layer=start, constrain=layout.constrain)
    trunk_params, frozen = freeze((parts.trunk, parts.frozen), layout, config.model.frozen_dtype)
    known = known_states(model.config, start, trunk_params, workdir)
    cache_gb = settings.hidden_cache_gb
    read = inputs_reader(model.config, start, trunk_params, layout, cache_gb, known=known)
    steps = () if start is None else range(num_steps)
    used = [comparisons.batch(config.seed, i, settings)[0] for i in steps]
    inputs = read(comparisons.texts, used=np.concatenate(used) if used else None)
    unseen_inputs = read(unseen.texts)
    del known
    optimizer = layout.replicate(make_optimizer(settings.optimizer, num_steps))
    num_micro_batches, trained = settings.num_micro_batches, layout.shard_params(parts.trained)
    context = model.config.max_length
    # What of them is used is in `frozen`, in the inputs and, soon, in the state.
    del model, parts, about
    score = jax.jit(functools.partial(text_scores, network))

    def scores_of(state, texts, inputs):
        params = merge_params(frozen, state.params)
        return all_scores(score, params, texts, inputs, layout, settings.batch_size)

    with stage_run(REWARD, config, workdir, num_steps) as run:
        state = run.restore(layout, init_train_state, trained, optimizer)
        del trained
        step = compile_step(
            reward_step, state, layout, network=network, num_micro_batches=num_micro_batches
        )
        if run.start == 0:
            scores = scores_of(state, unseen.texts, unseen_inputs)
            run.log_start(unseen.accuracy(scores, config.seed))
        for i in run.steps():
            batch = preference_batch(comparisons, inputs, config.seed, i, settings, layout, context)
            state, metrics = step(state, batch, optimizer, frozen=frozen)
            if i + 1 == num_steps or (i + 1) % settings.eval_every == 0:
                run.finish_step()
                scores = scores_of(state, unseen.texts, unseen_inputs)
                metrics |= unseen.accuracy(scores, config.seed)
            if i + 1 == num_steps:
                if references is not None:  # else the scores of the unseen texts
                    scores = scores_of(state, references, read(references))
                shift = -scores.mean()
                state = shift_scores(state, shift)
                metrics |= {"reward_model/calibration_shift": shift}
            run.end_step(i + 1, state, metrics)


def known_states(
    config: ModelConfig, start: int | None, trunk_params: Params, workdir: Path
) -> SharedStates | None:
    """The states after layer `start` that SFT has kept; None where there are none."""
    if not (workdir / FOLDER).is_dir():
        return None
    states = shared_states(config, start, trunk_params, workdir)
    return None if states is None else states.load()


def init_reward_model(model: Model, num_layers: int, seed: int) -> Model:
    """A policy's body, or its lower layers, with a new scalar head; a reward model stays one.

    Its training reads every text at EOS, whatever was its padding before."""
    config, params = keep_layers(model.config, model.params, num_layers or model.config.num_layers)
    if model.kind == "policy":
        init = reward_network(config).init
        head = jax.jit(lambda key: init(key)["head"])(jax.random.key(seed))  # nothing else is made
        params = {**params, "head": jax.tree.map(np.asarray, head)}
    return dataclasses.replace(model, kind="reward", config=config, params=params, padding_id=None)


def preference_batch(
    data: RewardData,
    inputs: Inputs,
    seed: int,
    step: int,
    settings: RewardSettings,
    layout: Layout,
    context: int,
) -> PreferenceBatch:
    """The batch of a step; `context` is the tokens that the model can read."""
    rows, pairs, valid, margins = data.batch(seed, step, settings)
    width = batch_width(data.texts, rows)
    # Each micro-batch is sharded; no pair has what fills the batch up.
    multiple = settings.num_micro_batches * layout.num_shards("batch")
    if settings.packing:
        found = inputs(layout.pad_batch(rows), width)
        parts, texts = packed_rows(data.texts, rows, fetch(found)[: len(rows)], multiple, context)
        pairs = texts[pairs]
    else:
        rows = layout.pad_batch(rows, multiple)
        parts = dict(inputs=inputs(rows, width), mask=data.texts.mask[rows, :width])
    of_pairs = layout.replicate(dict(pairs=pairs, valid=valid, margins=margins))
    return PreferenceBatch(**of_pairs, **layout.shard_batch(parts))


def packed_rows(
    texts: TokenizedTexts,
    rows: np.ndarray,
    inputs: np.ndarray,
    multiple: int,
    context: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Some texts, several a row, as a `PreferenceBatch` has them.

    Rows are as wide as those of all texts, and so many that few shapes are compiled. Those of short
    texts are wider, `TRUNK_ROW`: several fill them better.

    Args:
        texts: of the data set, each at most a row long.
        rows: [N], which of them.
        inputs: [N, W] or [N, W, D], theirs.
        multiple: of the number of rows.
        context: tokens that the model can read, at least those of a text.

    Returns:
        ({name: the array}, [N] int32: the number of each text in it).
    """
    mask = texts.mask[rows]
    lengths, width = mask.sum(axis=1), max(mask.shape[1], min(TRUNK_ROW, context))
    chosen = best_fit(lengths, width)
    multiple = math.lcm(multiple, ROWS)
    count = -(-len(chosen) // multiple) * multiple
    most = width // int(texts.mask.sum(axis=1).min())
    out = np.zeros((count, width, *inputs.shape[2:]), inputs.dtype)
    segment_ids, ends = np.zeros((count, width), np.int32), np.zeros((count, most), np.int32)
    numbers = np.zeros(len(rows), np.int32)
    for row, members in enumerate(chosen):
        begin = 0
        for place, text in enumerate(members):
            end = begin + lengths[text]
            out[row, begin:end] = inputs[text, : lengths[text]]
            segment_ids[row, begin:end], ends[row, place] = place + 1, end - 1
            numbers[text], begin = row * most + place, end
    return dict(inputs=out, mask=segment_ids > 0, segment_ids=segment_ids, ends=ends), numbers


def reference_texts(settings: RewardSettings, tokenizer: Any) -> TokenizedTexts | None:
    """The texts that shall score 0 on average; None is the held-out data."""
    if not settings.reference_data:
        return None
    left_out: list[str] = []
    records = load_texts(settings.reference_data, tokenizer, left_out=left_out)
    with naming_data("reward.reference_data", settings.reference_data, "reward.max_length"):
        texts = encode_demonstrations(records, tokenizer, max_length=settings.max_length)
    return with_dropped(texts, count_left_out(left_out))


def shift_scores(state: TrainState, shift: float) -> TrainState:
    """The same reward model with `shift` added to every score: it is in the head's bias."""
    head = state.params["head"]
    bias = head["bias"] + np.float32(shift)
    return state.replace(params={**state.params, "head": {**head, "bias": bias}})


REWARD = Stage(
    name="reward",
    title="Reward model",
    label="reward model",
    makes="A reward model: one score for a text, higher is better",
    data_fields=("data", "validation_data", "reference_data"),
    source_fields=("init_from",),
    progress={
        "reward_model/loss": "loss",
        "reward_model/accuracy": "accuracy",
        "reward_model/validation_accuracy": "validation",
    },
    outcome={"reward_model/validation_accuracy": "validation accuracy {:.1%} → {:.1%}"},
    read=read_reward,
    train=train_reward,
)
