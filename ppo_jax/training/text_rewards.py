"""Scores of responses by a reward model that reads their text."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.core.types import Prompts, Rollout
from ppo_jax.distributed.layout import Layout, fetch
from ppo_jax.inference.generate import decode_rows, prompt_width
from ppo_jax.inference.score import by_length, encode_responses
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.config import ModelConfig
from ppo_jax.training.ppo_setup import Setup


def text_scorer(
    setup: Setup,
    reward: Model,
    texts: list[str],
    tokenizer: Any,
    layout: Layout,
    scores_of: Callable[..., jax.Array] = text_scores,
) -> Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, np.ndarray]]]:
    """The scores of a reward model that reads text: responses are decoded by the policy's tokenizer
    and tokenised by its own, see `encode_responses`, and each is read as a row of its own length.
    All processes run the same programs.

    `scores_of` is (network, its parameters, tokens, mask) -> scores."""
    reader = dataclasses.replace(reward, params={})  # the setup has them, on the mesh

    @functools.cache
    def program(config: ModelConfig):
        network = setup.text_reward(config)

        def run(params, of_B, *inputs):
            return jnp.where(of_B, scores_of(network, params, *inputs), 0.0)

        return jax.jit(run, out_shardings=layout.batch_sharding)

    def score(chosen: np.ndarray, rollout: Rollout):
        asked = Prompts(tokens=rollout.prompt_tokens, mask=rollout.prompt_mask)
        tokens, mask, asked, ended = fetch(
            (rollout.response_tokens, rollout.response_mask, asked, rollout.has_eos)
        )
        stop_ids = setup.options.sampling.eos_ids
        responses = decode_rows(tokenizer, tokens, mask, asked, stop_ids)
        rows, too_long = encode_responses([texts[i] for i in chosen], responses, ended, reader)
        width = min(prompt_width(rows.tokens.shape[1]), reader.config.max_length)
        more = ((0, 0), (0, width - rows.tokens.shape[1]))
        inputs = layout.shard_batch((np.pad(rows.tokens, more), np.pad(rows.mask, more)))
        parts = [
            program(config)(setup.frozen.reward, layout.shard_batch(of_B), *inputs)
            for config, of_B in by_length(reader.config, rows.mask).items()
        ]
        scores = functools.reduce(jnp.add, parts)
        return scores, {"reward/too_long_fraction": too_long}

    return score
