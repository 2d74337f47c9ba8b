"""Policies on the same prompts with the same keys: what they write, and how far apart they are.

Dimension key: N prompts, S seeds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_jax.distributed.layout import Layout
from ppo_jax.distributed.processes import stop_if_asked
from ppo_jax.evaluation.statistics import distinct_n, mean_and_stderr, repetition
from ppo_jax.inference.generate import generate
from ppo_jax.inference.responses import Responses, read_rollouts
from ppo_jax.inference.score import row_texts, text_logprobs
from ppo_jax.io.stage_folder import Model
from ppo_jax.rollout.sampling import Sampling

REPEATED = 3  # words of an n-gram whose repetition within a response is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How every policy of a comparison is sampled."""

    sampling: Callable[[Any], Sampling]  # of a policy's tokenizer, whose stop tokens are its own
    temperature: float = 1.0
    max_prompt_length: int = 512  # tokens
    batch_size: int = 64  # responses at a time
    seed: int = 0


def respond(policy: Model, prompts: Sequence[str], how: How, layout: Layout | None) -> Responses:
    """A response to each prompt. It depends on the seed and the prompt's place, on nothing else.

    Raises:
        ValueError: as `generate` does.
    """
    texts, rollouts = generate(
        policy,
        prompts,
        sampling=how.sampling(policy.tokenizer),
        temperature=how.temperature,
        seed=how.seed,
        batch_size=how.batch_size,
        max_prompt_length=how.max_prompt_length,
        layout=layout,
        before_batch=lambda: stop_if_asked("the same command takes up the evaluation again"),
    )
    return read_rollouts(texts, rollouts)


def log_ratios(reference: Model, responses: Responses, temperature: float = 1.0) -> np.ndarray:
    """log p(response) - log p_reference(response) of some responses of a policy: [N] float64.

    Its mean is an unbiased estimate of KL(policy || reference), in nats a response, at the
    temperature of both. The tokens must mean the same to both, see `same_tokens`.
    """
    texts = row_texts(responses.rows, responses.lengths)
    return responses.logprobs - text_logprobs(reference, texts, temperature)


def same_tokens(policy: Any, other: Any) -> bool:
    """Whether every token of one policy is that of the other, so that there is a KL; the other may
    have more. Both are models or specs of them."""
    if policy.tokenizer is other.tokenizer:
        return True
    return policy.tokenizer.get_vocab().items() <= other.tokenizer.get_vocab().items()


def variety(texts: Sequence[str]) -> dict[str, float]:
    """Figures of a set of responses as text: distinct-1, distinct-2 and `repetition`."""
    figures = {f"distinct{n}": distinct_n(texts, n) for n in (1, 2)}
    return {**figures, "repetition": repetition(texts, REPEATED)}


def response_figures(seeds: Sequence[Responses]) -> dict[str, float | None]:
    """What is measured of the responses of one policy alone, of S seeds together.

    Returns:
        tokens and characters of a response, the share that ended by a stop token, the entropy in
        nats a token, and the `variety` of a seed, on average; "_stderr" behind a name is the
        standard error over prompts.
    """
    figures: dict[str, float | None] = {}
    measured = {
        "tokens": np.stack([r.lengths for r in seeds], axis=1),
        "characters": np.stack([characters(r.texts) for r in seeds], axis=1),
        "ended": np.stack([r.ended for r in seeds], axis=1),
    }
    for name, values in measured.items():
        figures[name], figures[f"{name}_stderr"] = mean_and_stderr(values)
    # The mean of -log p over sampled tokens estimates the entropy: no second pass is needed.
    total = sum(r.lengths.sum() for r in seeds)
    figures["entropy"] = float(-sum(r.logprobs.sum() for r in seeds) / total)
    each = [variety(r.texts) for r in seeds]
    return figures | {name: float(np.mean([x[name] for x in each])) for name in each[0]}


def characters(texts: Sequence[str]) -> np.ndarray:
    """The length of each text, [N] int, in a unit that does not depend on a tokenizer."""
    return np.array([len(text) for text in texts])


def whole_texts(prompts: Sequence[str], responses: Responses) -> list[str]:
    """Prompts with their responses, as judges read them."""
    return [p + r for p, r in zip(prompts, responses.texts, strict=True)]
