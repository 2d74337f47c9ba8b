"""Text in, text out: responses of a whole policy to prompts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.batches import encode_prompts, take_prompts
from ppo_jax.inputs import on_device
from ppo_jax.models import Model
from ppo_jax.networks import ModelConfig, policy_network
from ppo_jax.rollout import Sampling, rollout
from ppo_jax.structs import Rollout


def stop_ids(tokenizer: Any, stop_tokens: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's EOS and the given tokens.

    Raises:
        ValueError: one of them is not a token of the tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in stop_tokens if token not in vocabulary]:
        raise ValueError(f"stop tokens must be in the tokenizer's vocabulary, got {unknown}")
    ids = {tokenizer.eos_token_id} | {vocabulary[token] for token in stop_tokens}
    return tuple(sorted(ids))


def decode_responses(tokenizer: Any, responses: Rollout) -> list[str]:
    """The responses as text, without their stop tokens."""
    tokens, mask = jax.device_get((responses.response_tokens, responses.response_mask))
    ids = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@functools.lru_cache(maxsize=8)
def compiled_rollout(config: ModelConfig, sampling: Sampling):
    """One jitted rollout for all models of a shape: base, SFT and PPO compile once."""
    return jax.jit(functools.partial(rollout, policy_network(config), sampling=sampling))


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    temperature: float,
    seed: int,
    batch_size: int,
    max_prompt_length: int,
) -> tuple[list[str], list[Rollout]]:
    """Sample a response to each prompt.

    A response depends on the seed and on its prompt's place in the list, not on `batch_size`.

    Args:
        model: a policy.
        prompts: N texts.
        sampling: length, stop tokens and filters.
        temperature: 0 is greedy.
        seed: of the sampling.
        batch_size: prompts at a time.
        max_prompt_length: tokens; a longer prompt is an error.

    Returns:
        (N responses, the rollouts of the batches; the last is filled up with prompt 0).

    Raises:
        ValueError: the model is no policy, or a prompt is too long or has no token.
    """
    if model.kind != "policy":
        raise ValueError("model must be a policy to generate text, got a reward model")
    rows = encode_prompts(prompts, model.tokenizer, max_length=max_prompt_length)
    sample, params = compiled_rollout(model.config, sampling), on_device(model.params)
    responses, rollouts = [], []
    for begin in range(0, len(prompts), batch_size):
        numbers = np.arange(begin, begin + batch_size)
        chosen = np.where(numbers < len(prompts), numbers, 0)
        batch = sample(
            params,
            take_prompts(rows, chosen),
            jax.random.key(seed),
            temperature=jnp.float32(temperature),
            rows=jnp.asarray(numbers),
        )
        responses += decode_responses(model.tokenizer, batch)
        rollouts.append(batch)
    return responses[: len(prompts)], rollouts
