"""The loop of supervised fine-tuning."""

import collections
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.supervised import sft_loss, sft_step
from ppo_jax.config.run import Config
from ppo_jax.config.stages import SFTSettings
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import TextBatch
from ppo_jax.data.encode import (
    TokenizedTexts,
    batch_indices,
    encode_demonstrations,
    row_batches,
    with_dropped,
)
from ppo_jax.data.hidden_states import Inputs, batch_width
from ppo_jax.data.messages import count_left_out
from ppo_jax.data.packing import pack
from ppo_jax.data.readers import naming_data
from ppo_jax.data.records import Demonstration, data_files, load_texts, read_split
from ppo_jax.distributed.layout import make_layouts
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.io.stage_folder import load_source, source_steps
from ppo_jax.io.tokenizers import declared_stops
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.partition import start_layer, trains_experts
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

Texts = tuple[TokenizedTexts, TokenizedTexts]  # to train on, to validate on


def sft_data(settings: SFTSettings, seed: int, tokenizer: Any) -> Texts:
    """Tokenised training and validation texts, one a row or packed."""
    left_out = collections.defaultdict(list)

    def read(path: str) -> list[Demonstration]:
        return load_texts(path, tokenizer, turns=settings.turns, left_out=left_out[path])

    split = read_split(settings, seed, read, lambda record: record.text, left_out)
    stop_ids = tokenizer.convert_tokens_to_ids(declared_stops(tokenizer))
    length, parts = settings.max_length, []
    for (field, path), part in zip(data_files(settings), split, strict=True):
        with naming_data(f"sft.{field}", path, "sft.max_length"):
            texts = encode_demonstrations(part, tokenizer, max_length=length, stop_ids=stop_ids)
        parts.append(with_dropped(texts, count_left_out(left_out.pop(path, []))))
    return tuple(pack(part, max_length=length) if settings.packing else part for part in parts)


def read_sft(config: Config, start: ModelSpec) -> Texts:
    return sft_data(config.sft, config.seed, start.tokenizer)


def train_sft(config: Config, workdir: Path, base: str, data: Texts):
    """Fine-tune the base model on texts; the result is the stage folder `workdir/sft`."""
    settings, (layout, _) = config.sft, make_layouts(config.mesh)
    pin = source_steps(workdir / "sft").get("init_from")
    model = load_source(settings.init_from, workdir, base, config.model, layout, pin)
    texts, unseen = data
    num_steps = count_steps(settings, len(texts.tokens))
    model = with_adapters(model, settings.trainable, settings.lora, config.seed, layout)
    about = dict(data=fingerprint(texts), sources={"init_from": model})
    start, parts = open_stage(SFT, config, workdir, model, num_steps=num_steps, **about)
    coef = router_coef(settings, model.config)
    network = policy_network(model.config, start_layer=start, constrain=layout.constrain)
    trunk_params, frozen = freeze((parts.trunk, parts.frozen), layout, config.model.frozen_dtype)
    rows_of = functools.partial(
        batch_indices, config.seed, num_examples=len(texts.tokens), batch_size=settings.batch_size
    )
    layer = reward_layer(config, model.config, start)
    later = shared_states(model.config, layer, trunk_params, workdir)
    cache_gb = settings.hidden_cache_gb
    read = inputs_reader(model.config, start, trunk_params, layout, cache_gb, later=later)
    used = None if start is None else np.concatenate([rows_of(i) for i in range(num_steps)])
    inputs, unseen_inputs = read(texts, used=used), read(unseen)
    if later is not None:
        later.save()
        del later
    optimizer = layout.replicate(make_optimizer(settings.optimizer, num_steps))
    num_micro_batches = settings.num_micro_batches
    multiple = num_micro_batches * layout.num_shards("batch")  # each micro-batch is sharded
    trained = layout.shard_params(parts.trained)
    del model, parts, about  # what is used of them is in `frozen`, the inputs and the state
    # Divided by 1: the sum, so that each token counts once however the batches fall.
    loss = jax.jit(functools.partial(sft_loss, network, normalizer=1.0))

    def batch_of(texts, inputs, rows):
        filled = layout.pad_batch(rows, multiple)
        return layout.shard_batch(as_text_batch(texts, inputs, rows, filled))

    def validate(state):
        """Loss and perplexity over all validation texts, each token counted once."""
        params = merge_params(frozen, state.params)
        batches = row_batches(unseen.mask, settings.batch_size)
        sums = [loss(params, batch_of(unseen, unseen_inputs, rows))[0] for rows in batches]
        mean = float(np.sum(jax.device_get(sums)) / unseen.loss_mask.sum())
        return {
            "sft/validation_loss": mean,
            "sft/validation_perplexity": math.exp(min(mean, 700.0)),
        }

    with stage_run(SFT, config, workdir, num_steps) as run:
        state = run.restore(layout, init_train_state, trained, optimizer)
        del trained
        shape = dict(num_micro_batches=num_micro_batches, router_coef=coef)
        step = compile_step(sft_step, state, layout, network=network, **shape)
        if run.start == 0:
            run.log_start(validate(state))
        for i in run.steps():
            batch = batch_of(texts, inputs, rows_of(i))
            state, metrics = step(state, batch, optimizer, frozen=frozen)
            if i + 1 == num_steps or (i + 1) % settings.eval_every == 0:
                run.finish_step()
                metrics |= validate(state)
            run.end_step(i + 1, state, metrics)


def router_coef(settings: SFTSettings, shape: ModelConfig) -> float:
    """The weight of the loss that balances experts; 0 where no layer that is trained, or above one
    that is, has any.

    Raises:
        ValueError: the settings have one, and it would have no effect.
    """
    coef = settings.router_coef
    if trains_experts(shape, settings.trainable):
        return shape.experts.aux_coef if coef is None else coef
    if coef:
        raise ValueError(
            "sft.router_coef must be None or 0 where no layer with experts is trained "
            f"(sft.trainable={settings.trainable!r}), got {coef}"
        )
    return 0.0


def reward_layer(config: Config, shape: ModelConfig, start: int | None) -> int | None:
    """The layer after which the reward model of the run reads the states of texts, where SFT trains
    none below it, but those from `start` on; else None."""
    reward = config.reward
    if start is None or reward is None:
        return None
    if reward.init_from.partition("@")[0] not in ("sft", config.sft.init_from):
        return None
    kept = dataclasses.replace(shape, num_layers=reward.num_layers or shape.num_layers)
    layer = start_layer(kept, reward.trainable)
    return layer if layer and layer <= start else None


def as_text_batch(
    texts: TokenizedTexts, inputs: Inputs, rows: np.ndarray, filled: np.ndarray | None = None
) -> TextBatch:
    """The texts of `rows`; what `filled` has behind them is no text to learn."""
    filled = rows if filled is None else filled
    width = batch_width(texts, rows)
    loss_mask = texts.loss_mask[filled, :width]
    loss_mask[len(rows) :] = False
    return TextBatch(
        inputs=inputs(filled, width),
        tokens=texts.tokens[filled, :width],
        mask=texts.mask[filled, :width],
        loss_mask=loss_mask,
        segment_ids=None if texts.segment_ids is None else texts.segment_ids[filled, :width],
    )


SFT = Stage(
    name="sft",
    title="Supervised fine-tuning",
    label="SFT",
    makes="A language model after supervised fine-tuning",
    data_fields=("data", "validation_data"),
    source_fields=("init_from",),
    progress={"sft/loss": "loss", "sft/validation_loss": "validation"},
    outcome={"sft/validation_perplexity": "validation perplexity {:.4g} → {:.4g}"},
    read=read_sft,
    train=train_sft,
)
