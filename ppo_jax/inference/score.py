"""Scores of texts by a reward model, and log-probabilities of texts by a policy."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.data.encode import (
    TokenizedTexts,
    encode_all,
    leading_tokens,
    pad_right,
    row_batches,
    token_rows,
)
from ppo_jax.data.hidden_states import Inputs, batch_width, packed_outputs
from ppo_jax.distributed.layout import Layout, fetch, one_device
from ppo_jax.inference.responses import Responses
from ppo_jax.io.model_spec import reread_reason
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.config import ModelConfig

LOGITS_CHUNK = 32  # positions whose logits are held at a time


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
    responses: Responses,
    score_at: str = "eos",
) -> dict[int, float]:
    """{index: score} of sampled responses by a reward model, as PPO reads them.

    A reward model with another tokenizer reads their text, see `encode_responses`; any other the
    tokens that were sampled, of those that fit into its context.

    Args:
        reward: a reward model.
        policy: that the responses are of, or its spec.
        prompts: N texts.
        responses: N of them.
        score_at: as `ppo.score_at`.
    """
    if reread_reason(policy, reward):
        scores = score_responses(reward, prompts, responses.texts, responses.ended)
        return dict(enumerate(scores.tolist()))
    rows = closed_rows(responses, reward.tokenizer.eos_token_id, score_at)
    fitting = {i: row for i, row in enumerate(rows) if len(row) <= reward.config.max_length}
    if not fitting:
        return {}
    return dict(zip(fitting, score_ids(reward, list(fitting.values())).tolist(), strict=True))


def closed_rows(responses: Responses, eos: int, score_at: str) -> list[list[int]]:
    """Prompts with their responses, as tokens; the score of each is read at the last one.

    That is the last token of the response, or with `score_at` "eos" an EOS, which is put behind one
    that another stop token has ended.
    """
    both = zip(responses.rows, responses.ended, strict=True)
    if score_at != "eos":
        return responses.rows
    return [[*row, eos] if ended and row[-1] != eos else row for row, ended in both]


def row_texts(rows: Sequence[Sequence[int]], lengths: np.ndarray | None = None) -> TokenizedTexts:
    """Rows of tokens as texts, of which the last `lengths` tokens [N] are to predict; None is no
    token."""
    tokens, mask = pad_right(rows, max(map(len, rows)))
    positions = np.arange(tokens.shape[1])
    begins = mask.sum(axis=1) - (0 if lengths is None else lengths)
    loss_mask = mask & (positions >= begins[:, None]) & (positions > 0)
    return TokenizedTexts(tokens, mask, loss_mask, np.arange(len(rows)))


def score_ids(model: Model, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """A reward model's scores of rows of tokens, [N] float32, at the last token of each.

    No row is longer than the model's context.
    """
    return score_rows(model, row_texts(rows))


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


def by_length(config: ModelConfig, mask: np.ndarray) -> dict[ModelConfig, np.ndarray]:
    """{a model: which of N texts it reads, [N] bool}: each text is read by the model of rows of its
    length, and as it would be alone, see `ModelConfig.for_rows`. Most models are one for all.

    Args:
        config: the model of rows of any length.
        mask: [N, L] bool, of the texts.
    """
    lengths = mask.sum(axis=1)
    groups: dict[ModelConfig, list[int]] = {}
    for length in np.unique(lengths).tolist():
        groups.setdefault(config.for_rows(length), []).append(length)
    return {of_rows: np.isin(lengths, group) for of_rows, group in groups.items()}


@functools.lru_cache(maxsize=4)
def compiled_scores(config: ModelConfig, layout: Layout):
    """Tokens to the score at each of them, [N, L]."""
    return jax.jit(reward_network(config, constrain=layout.constrain).apply)


def score_rows(model: Model, rows: TokenizedTexts) -> np.ndarray:
    """A reward model's scores of tokenised texts, [N] float32, each as if it were the only one;
    short ones share rows."""
    layout, rows = model.layout or one_device(), without_padding(rows, model.padding_id)
    params, scores = layout.shard_params(model.params), np.empty(len(rows.mask), np.float32)

    def outputs(run, *arrays):
        tokens, mask, segment_ids = layout.shard_batch(arrays)
        return run(params, tokens, mask, segment_ids=segment_ids)

    for config, of_N in by_length(model.config, rows.mask).items():
        run = functools.partial(outputs, compiled_scores(config, layout))
        context, used = model.config.max_length, np.flatnonzero(of_N)
        for row, values in packed_outputs(rows, run, context, layout, used):
            scores[row] = values[-1]
    return scores


@functools.lru_cache(maxsize=4)
def compiled_logprobs(config: ModelConfig, layout: Layout):
    """Tokens to the log-probability, at each, of the token behind it, [N, L]."""
    network = policy_network(config, constrain=layout.constrain, logits_chunk=LOGITS_CHUNK)

    def logprobs(params, tokens, mask, segment_ids, temperature):
        following = jnp.roll(tokens, -1, axis=1)  # of the last of a row nothing is asked
        where = {} if segment_ids is None else {"segment_ids": segment_ids}
        return network.token_statistics(params, tokens, mask, following, temperature, **where)[0]

    return jax.jit(logprobs)


def text_logprobs(model: Model, texts: TokenizedTexts, temperature: float = 1.0) -> np.ndarray:
    """Log-probability, by a policy, of the tokens in the loss of each text: [N] float64, in nats.

    Short texts share rows, so that padding costs little. `temperature` divides the logits.
    """
    layout = model.layout or one_device()
    config = model.config.for_rows(int(texts.mask.sum(axis=1).max(initial=0)))
    run, params = compiled_logprobs(config, layout), layout.shard_params(model.params)
    divisor = layout.replicate(np.float32(temperature))

    def outputs(*arrays):
        return run(params, *layout.shard_batch(arrays), divisor)

    sums = np.empty(len(texts.mask), np.float64)
    for row, values in packed_outputs(texts, outputs, model.config.max_length, layout):
        asked = texts.loss_mask[row, 1 : len(values)]
        sums[row] = values[:-1][asked].sum(dtype=np.float64)
    return sums
