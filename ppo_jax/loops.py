"""The loops of supervised fine-tuning and reward-model training."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.batches import (
    Texts,
    batch_indices,
    encode_demonstrations,
    encode_preferences,
    encode_texts,
)
from ppo_jax.config import Config, OptimizerSettings, RewardSettings, SFTSettings
from ppo_jax.data import (
    load_demonstrations,
    load_preferences,
    load_ratings,
    split_by_text,
)
from ppo_jax.inputs import Inputs, batch_width, make_inputs, on_device
from ppo_jax.models import Model, load_model, load_source
from ppo_jax.networks import (
    Params,
    policy_network,
    reward_network,
    trunk_network,
)
from ppo_jax.optimizer import init_optimizer
from ppo_jax.pairs import held_out_pairs, pair_accuracy, rating_pairs
from ppo_jax.partition import Parts, keep_layers, merge_params, split_params, start_layer
from ppo_jax.runs import StageRun, open_stage
from ppo_jax.steps import (
    PreferenceBatch,
    TextBatch,
    reward_step,
    sft_loss,
    sft_step,
    text_scores,
)
from ppo_jax.structs import Optimizer, TrainState

VALIDATION_PAIRS = 20_000  # of unseen texts, ordered by their mean ratings
GAPS = {"": 0.0, "_gap1": 1.0, "_gap2": 2.0}  # least difference of mean ratings, in rating units


def describe(stage: str, config: Config, workdir: Path) -> dict:
    """What stage.json keeps of the settings, to compare with when the stage is resumed."""
    settings = dataclasses.asdict(getattr(config, stage))
    settings |= {"seed": config.seed, "model": dataclasses.asdict(config.model)}
    return {"stage": stage, "settings": without_folder(settings, f"{workdir}/")}


def without_folder(values: Any, folder: str) -> Any:
    """The settings with `{workdir}/` for the run's folder, which may be moved or renamed."""
    if isinstance(values, dict):
        return {name: without_folder(value, folder) for name, value in values.items()}
    return values.replace(folder, "{workdir}/") if isinstance(values, str) else values


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> Optimizer:
    """The numbers of an optimizer, on the device, where changing one does not recompile."""
    values = dataclasses.asdict(settings) | {"total_steps": total_steps}
    kind = values.pop("schedule")
    return Optimizer(**{k: jnp.float32(v) for k, v in values.items()}, schedule=kind)


def init_train_state(parts: Parts, optimizer: Optimizer) -> TrainState:
    params = jax.tree.map(jnp.array, parts.trained)  # copies: the state is donated
    opt_state = init_optimizer(optimizer, params)
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)


def count_steps(settings: SFTSettings | RewardSettings, num_rows: int) -> int:
    """Optimizer steps of num_epochs passes over `num_rows` texts."""
    return max(1, math.ceil(settings.num_epochs * num_rows / settings.batch_size))


def as_text_batch(texts: Texts, inputs: Inputs, rows: np.ndarray) -> TextBatch:
    width = batch_width(texts, rows)
    return TextBatch(
        inputs=inputs(rows, width),
        tokens=texts.tokens[rows, :width],
        mask=texts.mask[rows, :width],
        loss_mask=texts.loss_mask[rows, :width],
    )


def read_split(path: str, validation: str, fraction: float, seed: int, read, key, **split):
    """Training and validation records, disjoint by text."""
    if validation:
        return read(path), read(validation)
    shares = {"train": 1 - fraction, "validation": fraction}
    parts = split_by_text(read(path), shares, seed=seed, key=key, **split)
    for name, records in parts.items():
        if not records:
            raise ValueError(f"{path}: no record is left for {name}; give more data")
    return parts["train"], parts["validation"]


# --- supervised fine-tuning -----------------------------------------------------------------------


def sft_data(settings: SFTSettings, seed: int, tokenizer: Any) -> tuple[Texts, Texts]:
    """Tokenised training and validation texts."""
    split = read_split(
        settings.data,
        settings.validation_data,
        settings.validation_fraction,
        seed,
        load_demonstrations,
        lambda record: record.prompt + record.completion,
    )
    length = settings.max_length
    return tuple(encode_demonstrations(part, tokenizer, max_length=length) for part in split)


def train_sft(config: Config, workdir: Path, base: str) -> bool:
    """Fine-tune the base model on texts; the result is the stage folder `workdir/sft`.

    Args:
        config: of the run; its sft section.
        workdir: the run's folder.
        base: path of the base model.

    Returns:
        Whether there was anything to do: False when the stage was complete.
    """
    settings = config.sft
    model = load_model(base, config.model)
    texts, unseen = sft_data(settings, config.seed, model.tokenizer)
    num_steps = count_steps(settings, len(texts.tokens))
    start = start_layer(model.config, settings.trainable)
    parts = split_params(model.config, model.params, settings.trainable, start)
    description = describe("sft", config, workdir) | {"num_steps": num_steps}
    if not open_stage(workdir / "sft", model, parts, description):
        return False

    network = policy_network(model.config, start_layer=start)
    trunk = None if start is None else trunk_network(model.config, end_layer=start)
    trunk_params, frozen = on_device(parts.trunk), on_device(parts.frozen)
    read = functools.partial(
        make_inputs, trunk=trunk, trunk_params=trunk_params, cache_gb=settings.hidden_cache_gb
    )
    rows_of = functools.partial(
        batch_indices, config.seed, num_examples=len(texts.tokens), batch_size=settings.batch_size
    )
    used = None if trunk is None else np.concatenate([rows_of(i) for i in range(num_steps)])
    inputs = read(texts, used=used)
    unseen_inputs = read(unseen)
    optimizer = make_optimizer(settings.optimizer, num_steps)
    step = jax.jit(
        functools.partial(sft_step, network=network, num_micro_batches=settings.num_micro_batches),
        donate_argnums=0,
    )
    # Divided by 1: the sum, so that each token counts once however the batches fall.
    validate = jax.jit(functools.partial(sft_loss, network, normalizer=1.0))
    show = {"sft/loss": "loss", "sft/validation_loss": "validation"}
    with StageRun(
        workdir, "sft", num_steps=num_steps, save_every=settings.save_every, show=show
    ) as run:
        state = run.restore(init_train_state(parts, optimizer))
        for i in run.steps():
            batch = as_text_batch(texts, inputs, rows_of(i))
            state, metrics = step(state, batch, optimizer, frozen=frozen)
            if i + 1 == num_steps or (i + 1) % settings.eval_every == 0:
                params = merge_params(frozen, state.params)
                metrics |= validation_loss(validate, params, unseen, unseen_inputs, settings)
            run.end_step(i + 1, state, metrics | {"time/step_s": run.seconds()})
    return True


def validation_loss(validate, params, texts: Texts, inputs: Inputs, settings: SFTSettings) -> dict:
    """Loss and perplexity over all validation texts, each token counted once."""
    sums = [
        validate(params, as_text_batch(texts, inputs, rows))[0]
        for rows in row_batches(len(texts.tokens), settings.batch_size)
    ]
    loss = float(np.sum(jax.device_get(sums)) / texts.loss_mask.sum())
    return {"sft/validation_loss": loss, "sft/validation_perplexity": math.exp(min(loss, 700.0))}


def row_batches(num_rows: int, batch_size: int) -> list[np.ndarray]:
    """All rows once, in order."""
    return [
        np.arange(begin, min(begin + batch_size, num_rows))
        for begin in range(0, num_rows, batch_size)
    ]


# --- reward model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardData:
    """Texts, and which of them is preferred: by fixed pairs, or by ratings to draw pairs from."""

    texts: Texts
    pairs: np.ndarray | None = None  # [M, 2] rows of (chosen, rejected)
    ratings: list[tuple[float, ...]] | None = None  # a row each

    def batch(self, seed: int, step: int, settings: RewardSettings):
        """(rows [N], pairs [M, 2] within them, valid [M]) of a training step."""
        if self.ratings is None:
            chosen = batch_indices(
                seed, step, num_examples=len(self.pairs), batch_size=settings.batch_size // 2
            )
            pairs = np.arange(settings.batch_size, dtype=np.int32).reshape(-1, 2)
            return self.pairs[chosen].reshape(-1), pairs, np.ones(len(pairs), bool)
        rows = batch_indices(
            seed, step, num_examples=len(self.ratings), batch_size=settings.batch_size
        )
        ratings = [self.ratings[row] for row in rows]
        return rows, *rating_pairs(ratings, seed, step, num_pairs=settings.pairs_per_batch)

    def accuracy(self, scores: np.ndarray, seed: int) -> dict[str, float]:
        """Share of unseen pairs in the right order; with ratings, that of their means, by gap."""
        name = "reward_model/validation_accuracy"
        if self.ratings is None:
            return {name: pair_accuracy(scores, self.pairs)}
        means = np.array([np.mean(r) for r in self.ratings])
        reach = means.max() - means.min()
        return {
            name + suffix: pair_accuracy(
                scores, held_out_pairs(means, seed, num_pairs=VALIDATION_PAIRS, min_gap=gap)
            )
            for suffix, gap in GAPS.items()
            if reach > gap
        }


def reward_data(
    settings: RewardSettings, seed: int, tokenizer: Any, context: int
) -> tuple[RewardData, RewardData]:
    """Tokenised training and validation data.

    `max_length` limits the training texts alone; the validation texts may be as long as the
    model's context, so that the accuracy is that of all texts.
    """
    lengths = (settings.max_length, context)
    validation = (settings.validation_data, settings.validation_fraction, seed)
    if settings.format == "ratings":
        split = read_split(settings.data, *validation, load_ratings, lambda record: record.text)
        return tuple(
            rated(part, tokenizer, length) for part, length in zip(split, lengths, strict=True)
        )
    split = read_split(
        settings.data,
        *validation,
        load_preferences,
        lambda record: record.prompt or record.chosen,
        duplicates="keep",
    )
    encoded = (
        encode_preferences(part, tokenizer, max_length=length)
        for part, length in zip(split, lengths, strict=True)
    )
    return tuple(RewardData(texts=texts, pairs=pairs) for texts, pairs in encoded)


def rated(records: Sequence, tokenizer: Any, max_length: int) -> RewardData:
    texts = encode_texts([r.text for r in records], tokenizer, max_length=max_length)
    return RewardData(texts=texts, ratings=[records[i].ratings for i in texts.records])


def init_reward_model(model: Model, num_layers: int, seed: int) -> Model:
    """A policy's body, or its lower layers, with a new scalar head; a reward model stays one."""
    config, params = keep_layers(model.config, model.params, num_layers or model.config.num_layers)
    if model.kind == "policy":
        head = jax.jit(reward_network(config).init)(jax.random.key(seed))["head"]
        params = {**params, "head": jax.tree.map(np.asarray, head)}
    return dataclasses.replace(model, kind="reward", config=config, params=params)


def train_reward(config: Config, workdir: Path, base: str) -> bool:
    """Train a reward model; the result is the stage folder `workdir/reward`.

    After the last step the head's bias is set so that the reference texts score 0 on average.
    Arguments and result as for `train_sft`.
    """
    settings = config.reward
    model = load_source(settings.init_from, workdir, base, config.model)
    data, unseen = reward_data(settings, config.seed, model.tokenizer, model.config.max_length)
    num_steps = count_steps(settings, len(data.texts.tokens))
    model = init_reward_model(model, settings.num_layers, config.seed)
    start = start_layer(model.config, settings.trainable)
    parts = split_params(model.config, model.params, settings.trainable, start)
    description = describe("reward", config, workdir) | {"num_steps": num_steps}
    if not open_stage(workdir / "reward", model, parts, description):
        return False

    network = reward_network(model.config, start_layer=start)
    trunk = None if start is None else trunk_network(model.config, end_layer=start)
    trunk_params, frozen = on_device(parts.trunk), on_device(parts.frozen)

    def inputs_of(texts):
        return make_inputs(texts, trunk, trunk_params, cache_gb=settings.hidden_cache_gb)

    inputs, unseen_inputs = inputs_of(data.texts), inputs_of(unseen.texts)
    optimizer = make_optimizer(settings.optimizer, num_steps)
    step = jax.jit(
        functools.partial(
            reward_step, network=network, num_micro_batches=settings.num_micro_batches
        ),
        donate_argnums=0,
    )
    score = jax.jit(functools.partial(text_scores, network))
    show = {
        "reward_model/loss": "loss",
        "reward_model/accuracy": "accuracy",
        "reward_model/validation_accuracy": "validation",
    }

    def scores_of(state, texts, inputs):
        return all_scores(score, merge_params(frozen, state.params), texts, inputs, settings)

    with StageRun(
        workdir, "reward", num_steps=num_steps, save_every=settings.save_every, show=show
    ) as run:
        state = run.restore(init_train_state(parts, optimizer))
        for i in run.steps():
            rows, pairs, valid = data.batch(config.seed, i, settings)
            width = batch_width(data.texts, rows)
            batch = PreferenceBatch(
                inputs=inputs(rows, width),
                mask=data.texts.mask[rows, :width],
                pairs=pairs,
                valid=valid,
            )
            state, metrics = step(state, batch, optimizer, frozen=frozen)
            last = i + 1 == num_steps
            if last or (i + 1) % settings.eval_every == 0:
                scores = scores_of(state, unseen.texts, unseen_inputs)
                metrics |= unseen.accuracy(scores, config.seed)
            if last:
                if settings.reference_data:
                    texts = reference_texts(settings, model.tokenizer)
                    scores = scores_of(state, texts, inputs_of(texts))
                shift = -scores.mean()
                state = state.replace(params=shift_scores(state.params, shift))
                metrics |= {"reward_model/calibration_shift": shift}
            run.end_step(i + 1, state, metrics | {"time/step_s": run.seconds()})
    return True


def all_scores(score, params, texts: Texts, inputs: Inputs, settings) -> np.ndarray:
    """Scores of a whole data set, [N] float32."""
    scores = []
    for rows in row_batches(len(texts.tokens), settings.batch_size):
        width = batch_width(texts, rows)
        scores.append(score(params, inputs(rows, width), texts.mask[rows, :width]))
    return np.concatenate(jax.device_get(scores))


def reference_texts(settings: RewardSettings, tokenizer: Any) -> Texts:
    """The texts that shall score 0 on average."""
    records = load_demonstrations(settings.reference_data)
    return encode_demonstrations(records, tokenizer, max_length=settings.max_length)


def shift_scores(params: Params, shift: float) -> Params:
    """The same reward model with `shift` added to every score: it is in the head's bias."""
    bias = params["head"]["bias"] + jnp.float32(shift)
    return {**params, "head": {**params["head"], "bias": bias}}
