"""The loop of supervised fine-tuning."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.batches import Texts, batch_indices, encode_demonstrations
from ppo_jax.config import Config, SFTSettings
from ppo_jax.data import load_demonstrations
from ppo_jax.formats import naming_data
from ppo_jax.inputs import Inputs, batch_width, on_device
from ppo_jax.models import load_source
from ppo_jax.networks import policy_network
from ppo_jax.packing import pack
from ppo_jax.partition import merge_params
from ppo_jax.runs import StageRun, open_stage
from ppo_jax.steps import TextBatch, sft_loss, sft_step
from ppo_jax.training import (
    compile_step,
    count_steps,
    data_files,
    init_train_state,
    inputs_reader,
    make_optimizer,
    read_split,
    row_batches,
)

SHOW = {"sft/loss": "loss", "sft/validation_loss": "validation"}


def sft_data(settings: SFTSettings, seed: int, tokenizer: Any) -> tuple[Texts, Texts]:
    """Tokenised training and validation texts, one a row or packed."""
    read = functools.partial(load_demonstrations, tokenizer=tokenizer)
    split = read_split(settings, seed, read, lambda record: record.text)
    length, parts = settings.max_length, []
    for (field, path), part in zip(data_files(settings), split, strict=True):
        with naming_data(f"sft.{field}", path, "sft.max_length"):
            parts.append(encode_demonstrations(part, tokenizer, max_length=length))
    return tuple(pack(part, max_length=length) if settings.packing else part for part in parts)


def train_sft(config: Config, workdir: Path, base: str):
    """Fine-tune the base model on texts; the result is the stage folder `workdir/sft`.

    Args:
        config: of the run; its sft section.
        workdir: the run's folder.
        base: path of the base model.
    """
    settings = config.sft
    model = load_source("base", workdir, base, config.model)
    texts, unseen = sft_data(settings, config.seed, model.tokenizer)
    num_steps = count_steps(settings, len(texts.tokens))
    start, parts = open_stage("sft", config, workdir, model, num_steps=num_steps, sources={})
    network, frozen = policy_network(model.config, start_layer=start), on_device(parts.frozen)
    rows_of = functools.partial(
        batch_indices, config.seed, num_examples=len(texts.tokens), batch_size=settings.batch_size
    )
    read = inputs_reader(model.config, start, parts, settings.hidden_cache_gb)
    used = None if start is None else np.concatenate([rows_of(i) for i in range(num_steps)])
    inputs, unseen_inputs = read(texts, used=used), read(unseen)
    optimizer = make_optimizer(settings.optimizer, num_steps)
    pieces = settings.num_micro_batches
    step = compile_step(sft_step, network=network, num_micro_batches=pieces)
    # Divided by 1: the sum, so that each token counts once however the batches fall.
    loss = jax.jit(functools.partial(sft_loss, network, normalizer=1.0))

    def validate(state):
        params = merge_params(frozen, state.params)
        return validation_loss(loss, params, unseen, unseen_inputs, settings.batch_size)

    with StageRun(
        workdir, "sft", num_steps=num_steps, save_every=settings.save_every, show=SHOW
    ) as run:
        state = run.restore(init_train_state(parts, optimizer))
        if run.start == 0:
            run.log_start(validate(state))
        for i in run.steps():
            batch = jax.device_put(as_text_batch(texts, inputs, rows_of(i)))
            state, metrics = step(state, batch, optimizer, frozen=frozen)
            if i + 1 == num_steps or (i + 1) % settings.eval_every == 0:
                run.settle()
                metrics |= validate(state)
            run.end_step(i + 1, state, metrics)


def as_text_batch(texts: Texts, inputs: Inputs, rows: np.ndarray) -> TextBatch:
    width = batch_width(texts, rows)
    return TextBatch(
        inputs=inputs(rows, width),
        tokens=texts.tokens[rows, :width],
        mask=texts.mask[rows, :width],
        loss_mask=texts.loss_mask[rows, :width],
        segments=None if texts.segments is None else texts.segments[rows, :width],
    )


def validation_loss(loss, params, texts: Texts, inputs: Inputs, batch_size: int) -> dict:
    """Loss and perplexity over all validation texts, each token counted once."""
    sums = [
        loss(params, as_text_batch(texts, inputs, rows))[0]
        for rows in row_batches(texts.mask, batch_size)
    ]
    mean = float(np.sum(jax.device_get(sums)) / texts.loss_mask.sum())
    return {"sft/validation_loss": mean, "sft/validation_perplexity": math.exp(min(mean, 700.0))}
