"""A small evaluation while PPO trains: the same prompts and keys every few iterations.

Dimension key: N prompts, B = N filled up to the shards, T response tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.algorithms.experience import policy_logprobs, response_scores, sample_responses
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.run import Config
from ppo_jax.core.types import FrozenParams, Hyperparameters, PPOState, Rollout
from ppo_jax.data.encode import take_prompts
from ppo_jax.data.prompts import PromptData
from ppo_jax.distributed.layout import Layout, fetch
from ppo_jax.inference.generate import decode_rows
from ppo_jax.training.ppo_setup import Setup

# N whole texts, prompt and response -> {judge: its scores [N]}; the headline judge is "gold".
Rate: TypeAlias = Callable[[Sequence[str]], Mapping[str, np.ndarray]]
# (config, workdir, the policy's tokenizer) -> (the prompts, their judges)
Judging: TypeAlias = Callable[..., tuple[PromptData, Rate]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """One response to each prompt, with what needs no judge."""

    texts: list[str]  # N, prompt and response
    metrics: dict[str, float]


def is_due(settings: PPOSettings, step: int) -> bool:
    """Whether the policy is evaluated after so many iterations: every so many, at the last, and
    where a checkpoint is saved that is kept by what the evaluation says of it."""
    if not settings.evaluate_every:
        return False
    saved = keeps_by_evaluation(settings) and step % settings.save_every == 0
    return saved or step % settings.evaluate_every == 0 or step == settings.num_iterations


def keeps_by_evaluation(settings: PPOSettings) -> bool:
    """Whether the best checkpoint is so by a metric of the evaluation."""
    return isinstance(settings.keep, str) and settings.keep.startswith("best:eval/")


class Evaluation:
    """What `eval/*` of a run is: call `begin` with the starting policy, then the object itself.

    It has a key of its own and takes none of the training's.

    Args:
        sample: samples and measures a policy, see `make_sample_and_measure`.
        rate: asks the judges.
    """

    def __init__(self, sample: Callable[[PPOState], Sampled], rate: Rate):
        self._sample, self._rate = sample, rate
        self._start: Mapping[str, np.ndarray] = {}

    def begin(self, state: PPOState) -> dict[str, float]:
        """The metrics of the starting policy, whose responses the win rates are against."""
        sampled = self._sample(state)
        self._start = self._rate(sampled.texts)
        return self._metrics(sampled, self._start)

    def __call__(self, state: PPOState) -> dict[str, float]:
        """The metrics of a policy."""
        sampled = self._sample(state)
        return self._metrics(sampled, self._rate(sampled.texts))

    def _metrics(self, sampled: Sampled, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
        metrics = dict(sampled.metrics)  # of the headline: "eval/gold_score", "eval/gold_win_rate"
        for judge, now in scores.items():
            wins = (now > self._start[judge]) + 0.5 * (now == self._start[judge])
            metrics |= {
                f"eval/{judge}_score": float(np.mean(now)),
                f"eval/{judge}_win_rate": float(np.mean(wins)),
            }
        return metrics


def compile_sampler(setup: Setup, layout: Layout):
    """(state, hyperparameters, prompts, key, frozen=) -> one response to each of the prompts.

    One object for samples and evaluation is one program where they take as many prompts.
    """
    options = sampler_options(setup.options)
    return jax.jit(
        functools.partial(sample_responses, networks=setup.networks, options=options),
        out_shardings=layout.batch_sharding,
    )


def sampler_options(options: PPOOptions) -> PPOOptions:
    """Those by which samples are made: one of each prompt, all at once."""
    once = dict(samples_per_prompt=1, max_concurrent=0, min_free_slots=0)
    sampling = dataclasses.replace(options.sampling, **once)
    return dataclasses.replace(options, sampling=sampling, keep_samples=0)


def make_sample_and_measure(
    setup: Setup,
    tokenizer: Any,
    data: PromptData,
    score: Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, Any]]] | None,
    layout: Layout,
    sampler: Callable[..., Rollout],
    config: Config,
) -> Callable[[PPOState], Sampled]:
    """state -> `Sampled`.

    Args:
        setup: of the run.
        tokenizer: of the policy.
        data: N prompts.
        score: (which of the prompts, their rollout) -> (scores, metrics) of a function or of a
            reward model that reads text; None is the reward model of the setup.
        layout: of the updates.
        sampler: see `compile_sampler`.
        config: of the run; temperature and seed are those of its evaluation.
    """
    rows = layout.pad_batch(np.arange(len(data.texts)))
    prompts = take_prompts(data.prompts, rows)
    on_mesh, key = layout.shard_batch(prompts), layout.replicate(jax.random.key(config.seed + 1))
    temperature = layout.replicate(np.float32(config.evaluate.temperature))
    numbers = dataclasses.replace(setup.hyperparameters, temperature=temperature)
    how = dict(networks=setup.networks, eos_id=setup.options.score_eos)
    measure = jax.jit(functools.partial(measures, **how))
    stop_ids = setup.options.sampling.eos_ids

    def sample(state: PPOState) -> Sampled:
        rollout = sampler(state, numbers, on_mesh, key, frozen=setup.frozen)
        figures = measure(rollout, numbers, frozen=setup.frozen)
        if score is not None:
            scores, _ = score(rows, rollout)
            figures |= {"eval/proxy_score": scores.sum(axis=1) if scores.ndim == 2 else scores}
        figures, *sampled = fetch((figures, rollout.response_tokens, rollout.response_mask))
        responses = decode_rows(tokenizer, *sampled, prompts, stop_ids)
        count = len(data.texts)
        return Sampled(
            texts=[p + r for p, r in zip(data.texts, responses, strict=False)],
            metrics={k: float(np.mean(v[:count], dtype=np.float64)) for k, v in figures.items()},
        )

    return sample


def measures(
    rollout: Rollout,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    eos_id: int | None,
) -> dict[str, jax.Array]:
    """Of each response, [B] float32: its log-ratio to the reference, whose mean is the KL; its
    tokens; its score by a reward model that reads them."""
    mask = rollout.response_mask
    inputs = rollout.tokens if networks.trunk is None else rollout.hidden_states
    reference = policy_logprobs(
        rollout,
        frozen.ref_policy,
        hyperparameters,
        policy_inputs=inputs,
        frozen=frozen,
        networks=networks,
    )
    figures = {
        "eval/kl": jnp.where(mask, rollout.logprobs - reference, 0.0).sum(axis=1),
        "eval/length": mask.sum(axis=1).astype(jnp.float32),
    }
    if networks.reward is not None:
        figures["eval/proxy_score"] = response_scores(
            rollout, frozen=frozen, networks=networks, eos_id=eos_id
        )
    return figures
