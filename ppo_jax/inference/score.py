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
    leading_tokens,
    pad_right,
    row_batches,
    token_rows,
    unpadded,
)
from ppo_jax.data.hidden_states import Inputs, batch_width, make_inputs
from ppo_jax.distributed.layout import Layout, fetch, one_device
from ppo_jax.io.model_spec import reread_reason
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


def score_texts(model: Model, texts: list[str]) -> np.ndarray:
    """A reward model's scores of whole texts, [N] float32."""
    return score_rows(model, encode_all(texts, model.tokenizer, max_length=model.config.max_length))


def sampled_scores(
    reward: Model,
    policy: Model,
    prompts: Sequence[str],
    responses: Sequence[str],
    rollouts: Sequence[Rollout],
    score_at: str = "eos",
) -> dict[int, float]:
    """{index: score} of sampled responses by a reward model, as PPO reads them.

    A reward model with another tokenizer reads their text, see `encode_responses`; any other the
    tokens that were sampled, of those that fit into its context.

    Args:
        reward: a reward model.
        policy: that the responses are of.
        prompts: N texts.
        responses: N texts, without their stop tokens.
        rollouts: of the batches, with N or more rows.
        score_at: as `ppo.score_at`.
    """
    if reread_reason(policy, reward):
        ended = np.concatenate(fetch([rollout.has_eos for rollout in rollouts]))[: len(prompts)]
        return dict(enumerate(score_responses(reward, prompts, responses, ended).tolist()))
    rows = sampled_rows(rollouts, reward.tokenizer.eos_token_id, score_at)[: len(prompts)]
    fitting = {i: row for i, row in enumerate(rows) if len(row) <= reward.config.max_length}
    if not fitting:
        return {}
    return dict(zip(fitting, score_ids(reward, list(fitting.values())).tolist(), strict=True))


def sampled_rows(rollouts: Sequence[Rollout], eos: int, score_at: str) -> list[list[int]]:
    """Prompts with their responses, as tokens; the score of each is read at the last one.

    That is the last token of the response, or with `score_at` "eos" an EOS, which is put behind one
    that another stop token has ended.
    """
    rows = []
    for tokens, mask, ended in fetch([(r.tokens, r.mask, r.has_eos) for r in rollouts]):
        for row, has_ended in zip(unpadded(tokens, mask), ended, strict=True):
            closes = score_at == "eos" and has_ended and row[-1] != eos
            rows.append([*row, eos] if closes else row)
    return rows


def score_ids(model: Model, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """A reward model's scores of rows of tokens, [N] float32, at the last token of each.

    No row is longer than the model's context.
    """
    tokens, mask = pad_right(rows, max(map(len, rows)))
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
