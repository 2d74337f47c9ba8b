"""One token at a time: which is chosen, and when a response ends.

Dimension key: B sequences, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax.distributions import sample, token_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What shapes the sampling program; the temperature is a number, passed apart."""

    response_length: int  # T, the most tokens a response may have
    eos_ids: tuple[int, ...]  # a response ends with any of these; () samples T tokens
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    samples_per_prompt: int = 1  # responses to each prompt; its keys and values are computed once
    slots: int = 0  # S, responses under way at a time; 0 is all
    refill: int = 0  # G, free slots that the next prompts wait for; 0 is a quarter of the slots

    def group(self, slots: int) -> int:
        """G: a multiple of the samples of a prompt."""
        wanted = self.refill or max(slots // 4, 1)
        return max(wanted // self.samples_per_prompt, 1) * self.samples_per_prompt


def is_eos(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """[B] bool: which tokens are stop tokens."""
    return (tokens[:, None] == eos_ids[None]).any(axis=1)


def choose(logits, row_keys, t, sampling: Sampling, temperature) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits [B, V], and its log-prob over the full vocabulary; t is the
    token's number in its response, [] or [B]."""
    keys = jax.vmap(jax.random.fold_in)(row_keys, jnp.broadcast_to(t, row_keys.shape))

    def one(key, row_logits):
        return sample(
            key,
            row_logits,
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    tokens = jax.vmap(one)(keys, logits).astype(jnp.int32)
    logprobs = token_logprobs(logits[:, None], tokens[:, None], temperature=temperature)
    return tokens, logprobs[:, 0]
