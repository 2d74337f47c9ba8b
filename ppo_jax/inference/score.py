"""Scores of texts by a reward model."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.core.types import Rollout
from ppo_jax.data.encode import (
    TokenizedTexts,
    encode_all,
    encode_texts,
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

    That is at the last token of each: its stop token, or where it was cut off.

    Args:
        model: a reward model with the policy's tokenizer.
        rollouts: of the batches.
        count: responses, the first of all.

    Raises:
        ValueError: as `score_ids`.
    """
    rows = [row for r in rollouts for row in unpadded(*fetch((r.tokens, r.mask)))]
    return score_ids(model, rows[:count])


def score_responses(
    model: Model, prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]
) -> np.ndarray:
    """A reward model's scores of responses as text, tokenised by its own tokenizer, [N] float32.

    EOS is put behind those that a stop token ended, and behind no other.

    Raises:
        ValueError: as `score_ids`.
    """
    texts = [((prompt + text, True),) for prompt, text in zip(prompts, responses, strict=True)]
    closed, cut = (token_rows(texts, model.tokenizer, append_eos=x) for x in (True, False))
    rows = [a.ids if ended else b.ids for a, b, ended in zip(closed, cut, finished, strict=True)]
    return score_ids(model, rows)


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


@functools.lru_cache(maxsize=4)
def compiled_scores(config: ModelConfig, layout: Layout):
    network = reward_network(config, constrain=layout.constrain)
    return jax.jit(functools.partial(text_scores, network))


def score_rows(model: Model, rows: TokenizedTexts) -> np.ndarray:
    """A reward model's scores of tokenised texts, [N] float32."""
    layout = model.layout or one_device()
    score, inputs = compiled_scores(model.config, layout), make_inputs(rows, None, None, cache_gb=0)
    return all_scores(score, layout.shard_params(model.params), rows, inputs, layout, BATCH_SIZE)
