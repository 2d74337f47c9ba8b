"""What follows from a config, as one table at the start of a run."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax

from ppo_jax.config import Config, PPOSettings
from ppo_jax.networks import ModelConfig, policy_network, reward_network
from ppo_jax.partition import split_params, start_layer
from ppo_jax.plan import Shape

Rows = list[tuple[str, str]]


def summary(config: Config, starts: Mapping[str, Shape], stages: Sequence[str]) -> str:
    """A table of two columns.

    Args:
        config: of the run.
        starts: what the stages start from, see `plan.find_starts`.
        stages: those that will run.
    """
    used = f"{jax.devices()[0].device_kind}, the first of {jax.device_count()}"
    rows = [("device", f"{used}; it holds all of the sizes below")]
    if "sft" in stages:
        rows += sft_rows(config, starts["sft"])
    if "reward" in stages:
        rows += reward_rows(config, starts["reward"])
    if "ppo" in stages:
        rows += ppo_rows(config.ppo, starts["ppo"].config)
        rows += memory_rows(config.ppo, starts["ppo"], starts.get("score"))
    if "evaluate" in stages:
        rows += [("evaluation", f"{config.evaluate.num_prompts} prompts")]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def sft_rows(config: Config, start: Shape) -> Rows:
    s = config.sft
    unit = "rows of texts" if s.packing else "texts"
    most = s.batch_size * s.max_length
    params = parameters(start)
    memory = count(params) + 2 * count_trained(start.config, params, s.trainable)
    return [
        ("sft starts from", describe(start)),
        ("sft batch", f"{s.batch_size} {unit}, at most {most} tokens a step"),
        ("sft trains", trained(start.config, params, s.trainable)),
        ("sft memory", f"{size_of(4 * memory)}, parameters and Adam's two moments"),
    ]


def reward_rows(config: Config, start: Shape) -> Rows:
    s = config.reward
    depth = s.num_layers or start.config.num_layers
    shape = dataclasses.replace(start.config, num_layers=depth)
    params = parameters(dataclasses.replace(start, kind="reward", config=shape))
    pairs = f", {s.pairs_per_batch} comparisons" if s.format == "ratings" else ""
    most = s.batch_size * s.max_length
    memory = count(params) + 2 * count_trained(shape, params, s.trainable)
    return [
        ("reward starts from", f"{describe(start)}; keeps {depth} layers"),
        ("reward batch", f"{s.batch_size} texts{pairs}, at most {most} tokens"),
        ("reward trains", trained(shape, params, s.trainable)),
        ("reward memory", f"{size_of(4 * memory)}, parameters and Adam's two moments"),
    ]


def ppo_rows(s: PPOSettings, model: ModelConfig) -> Rows:
    steps = s.num_epochs * s.num_minibatches
    minibatch = s.rollout_batch_size // s.num_minibatches
    piece = minibatch // s.num_micro_batches
    length = s.max_prompt_length + s.response_length
    episodes = s.rollout_batch_size * s.num_iterations
    heads = 2 * model.num_kv_heads * model.head_dim * model.num_layers
    cache = s.rollout_batch_size * length * heads * (4 if model.dtype == "float32" else 2)
    logits = piece * s.response_length * model.vocab_size * 4
    return [
        ("ppo iteration", f"{s.rollout_batch_size} episodes, at most {length} tokens each"),
        ("ppo update", f"{steps} optimizer steps of {minibatch} episodes, {piece} at a time"),
        ("ppo in all", f"{episodes} episodes, {steps * s.num_iterations} optimizer steps"),
        ("ppo tokens a step", f"{minibatch * s.response_length} response tokens at most"),
        ("KV cache", size_of(cache)),
        ("logits of a piece", size_of(logits)),
    ]


def memory_rows(s: PPOSettings, policy: Shape, score: Shape | None) -> Rows:
    """Float32 parameters of the four models. Frozen layers that two of them share count once."""
    params = parameters(policy)
    policy_trained = count_trained(policy.config, params, s.trainable)
    critic = policy if score is None or s.critic_init_from == "policy" else score
    critic_params = parameters(dataclasses.replace(critic, kind="reward"))
    critic_trained = count_trained(critic.config, critic_params, s.value_trainable)
    partial = s.trainable != "all" and s.value_trainable != "all"
    scorer = 0 if score is None else count(parameters(score))
    rows = [
        ("memory, policy", count(params)),
        ("memory, reference", policy_trained),
        ("memory, critic", critic_trained if partial else count(critic_params)),
        ("memory, reward model", min(scorer, critic_trained) if partial else scorer),
        ("memory, optimizer", 2 * (policy_trained + critic_trained)),
    ]
    return [
        ("ppo starts from", describe(policy)),
        ("policy trains", trained(policy.config, params, s.trainable)),
        ("critic trains", trained(critic.config, critic_params, s.value_trainable)),
        *((label, size_of(4 * number)) for label, number in rows),
    ]


def describe(start: Shape) -> str:
    model = start.config
    return (
        f"a {start.kind} model of {count(parameters(start)) / 1e6:.1f}M parameters, "
        f"{model.num_layers} layers x {model.embed_dim}, {model.vocab_size} tokens, "
        f"context {model.max_length}"
    )


def parameters(shape: Shape):
    """The parameter tree of a model, as shapes alone."""
    return parameters_of(shape.kind, shape.config)


@functools.lru_cache(maxsize=8)  # tracing a deep network takes seconds
def parameters_of(kind: str, config: ModelConfig):
    network = policy_network if kind == "policy" else reward_network
    return jax.eval_shape(network(config).init, jax.random.key(0))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_trained(model: ModelConfig, params, trainable: str | int) -> int:
    start = start_layer(model, trainable)
    split = jax.eval_shape(lambda p: split_params(model, p, trainable, start).trained, params)
    return count(split)


def trained(model: ModelConfig, params, trainable: str | int) -> str:
    names = {"all": "all layers", "head": "the head alone"}
    what = names.get(trainable, f"the top {trainable} layers")
    return f"{what}, {count_trained(model, params, trainable) / 1e6:.1f}M parameters"


def size_of(number: float) -> str:
    """Bytes, in the unit that suits them."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
