"""Scores of texts by a reward model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.core.types import Rollout
from ppo_jax.data.encode import (
    TokenizedTexts,
    encode_all,
    encode_texts,
    leading_tokens,
    pad_right,
    row_batches,
    token_rows,
    unpadded,
)
from ppo_jax.data.hidden_states import Inputs, batch_width, make_inputs
from ppo_jax.distributed.layout import Layout, fetch, one_device
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import reward_network
from ppo_jax.models.config import ModelConfig

BATCH_SIZE = 64  # texts


def all_scores(
    score, params, texts: TokenizedTexts, inputs: Inputs, layout: Layout, batch_size: int
) -> np.ndarray:
    """Scores of a whole data set, [N] float32."""
    batches, scores = row_batches(texts.mask, batch_size), []
    for rows in batches:
        width, filled = batch_width(texts, rows), layout.pad_batch(rows)
        batch = layout.shard_batch((inputs(filled, width), texts.mask[filled, :width]))
        scores.append(score(params, *batch))
    ordered = np.empty(len(texts.mask), np.float32)
    for rows, batch_scores in zip(batches, fetch(scores), strict=True):
        ordered[rows] = batch_scores[: len(rows)]
    return ordered


def scores_that_fit(model: Model, texts: list[str]) -> dict[int, float]:
    """{index: score} of the texts that fit into a reward model's context: a response may have more
    tokens when its text is tokenised again."""
    rows = encode_texts(texts, model.tokenizer, max_length=model.config.max_length)
    return dict(zip(rows.records.tolist(), score_rows(model, rows).tolist(), strict=True))


def score_texts(model: Model, texts: list[str]) -> np.ndarray:
    """A reward model's scores of whole texts, [N] float32."""
    return score_rows(model, encode_all(texts, model.tokenizer, max_length=model.config.max_length))


def score_rollouts(model: Model, rollouts: Sequence[Rollout], count: int) -> np.ndarray:
    """A reward model's scores of sampled responses, [count] float32, read as PPO reads them.

    That is at the last token of each, where it was cut off or at EOS, which is put behind one that
    another stop token has ended; see `ppo.score_at`.

    Args:
        model: a reward model with the policy's tokenizer.
        rollouts: of the batches.
        count: responses, the first of all.

    Raises:
        ValueError: as `score_ids`.
    """
    eos, rows = model.tokenizer.eos_token_id, []
    for tokens, mask, ended in fetch([(r.tokens, r.mask, r.has_eos) for r in rollouts]):
        for row, has_ended in zip(unpadded(tokens, mask), ended, strict=True):
            rows.append([*row, eos] if has_ended and row[-1] != eos else row)
    return score_ids(model, rows[:count])


def score_ids(model: Model, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """A reward model's scores of rows of tokens, [N] float32, at the last token of each.

    Raises:
        ValueError: a row is longer than the model's context.
    """
    longest = max(map(len, rows))
    if longest > model.config.max_length:
        raise ValueError(
            f"a prompt with its response must have at most {model.config.max_length} tokens (the "
            f"reward model's context), got {longest}"
        )
    tokens, mask = pad_right(rows, longest)
    return score_rows(
        model, TokenizedTexts(tokens, mask, np.zeros_like(mask), np.arange(len(rows)))
    )


def encode_responses(
    prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], model: Any
) -> tuple[TokenizedTexts, np.ndarray]:
    """Prompts with their responses as a reward model reads them by its own tokenizer.

    A text is tokenised whole, with EOS behind a response that has ended, and none behind one that
    was cut off. Of a text that is longer than the model's context the oldest tokens are left out,
    but for those that the tokenizer puts before every text.

    Args:
        prompts: N texts.
        responses: N texts, without their stop tokens.
        ended: [N] bool, by a stop token.
        model: the reward model, or its spec.

    Returns:
        (N rows whose last token is where the score is read, [N] bool: which were too long).
    """
    tokenizer, most = model.tokenizer, model.config.max_length
    eos, leading = tokenizer.eos_token_id, leading_tokens(tokenizer)
    whole = [((p + r, True),) for p, r in zip(prompts, responses, strict=True)]
    encoded = token_rows(whole, tokenizer, append_eos=False)
    rows = []
    for (ids, _), has_ended in zip(encoded, ended, strict=True):
        closes = ids[-1:] != [eos] if has_ended else not ids
        rows.append(ids + [eos] if closes else ids)
    too_long = np.array([len(ids) > most for ids in rows])
    rows = [ids if len(ids) <= most else leading + ids[len(leading) - most :] for ids in rows]
    tokens, mask = pad_right(rows, most)
    texts = TokenizedTexts(tokens, mask, np.zeros_like(mask), np.arange(len(rows)))
    return without_padding(texts, model.padding_id), too_long


def without_padding(rows: TokenizedTexts, padding_id: int | None) -> TokenizedTexts:
    """The rows up to the last token that is not padding, see `huggingface.padding_id`.

    A row of padding alone keeps its first token, as in transformers.
    """
    if padding_id is None:
        return rows
    positions = np.arange(rows.mask.shape[1])
    last = np.where(rows.mask & (rows.tokens != padding_id), positions, 0).max(axis=1)
    return dataclasses.replace(rows, mask=rows.mask & (positions <= last[:, None]))


def score_responses(
    model: Model, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]
) -> np.ndarray:
    """A reward model's scores of responses as text, [N] float32; see `encode_responses`."""
    return score_rows(model, encode_responses(prompts, responses, ended, model)[0])


@functools.lru_cache(maxsize=4)
def compiled_scores(config: ModelConfig, layout: Layout):
    network = reward_network(config, constrain=layout.constrain)
    return jax.jit(functools.partial(text_scores, network))


def score_rows(model: Model, rows: TokenizedTexts) -> np.ndarray:
    """A reward model's scores of tokenised texts, [N] float32."""
    layout, rows = model.layout or one_device(), without_padding(rows, model.padding_id)
    score, inputs = compiled_scores(model.config, layout), make_inputs(rows, None, None, cache_gb=0)
    return all_scores(score, layout.shard_params(model.params), rows, inputs, layout, BATCH_SIZE)
