"""What follows from a config, as one table at the start of a run."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from ppo_jax.config import Config
from ppo_jax.networks import ModelConfig, policy_network
from ppo_jax.partition import keep_layers, split_params, start_layer


def summary(config: Config, model: ModelConfig, stages: Sequence[str]) -> str:
    """A table of two columns.

    Args:
        config: of the run.
        model: the base model's shape.
        stages: those that will run.
    """
    params = jax.eval_shape(policy_network(model).init, jax.random.key(0))
    rows = [
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        (
            "base model",
            f"{count(params) / 1e6:.1f}M parameters, {model.num_layers} layers x "
            f"{model.embed_dim}, {model.vocab_size} tokens, context {model.max_length}",
        ),
    ]
    if "sft" in stages:
        s = config.sft
        rows += [("sft batch", f"{s.batch_size} texts of at most {s.max_length} tokens")]
        rows += [("sft trains", trained(model, params, s.trainable))]
    if "reward" in stages:
        s = config.reward
        pairs = s.pairs_per_batch if s.format == "ratings" else s.batch_size // 2
        depth = s.num_layers or model.num_layers
        rows += [("reward batch", f"{s.batch_size} texts, {pairs} comparisons")]
        rows += [("reward model", f"the lowest {depth} layers, trains {name(s.trainable)}")]
    if "ppo" in stages:
        rows += ppo_rows(config, model, params)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def ppo_rows(config: Config, model: ModelConfig, params) -> list[tuple[str, str]]:
    s = config.ppo
    steps = s.num_epochs * s.num_minibatches
    minibatch = s.rollout_batch_size // s.num_minibatches
    length = s.max_prompt_length + s.response_length
    episodes = s.rollout_batch_size * s.num_iterations
    heads = 2 * model.num_kv_heads * model.head_dim * model.num_layers
    itemsize = 4 if model.dtype == "float32" else 2
    cache = s.rollout_batch_size * length * heads * itemsize
    piece = minibatch // s.num_micro_batches
    logits = piece * s.response_length * model.vocab_size * 4
    return [
        ("ppo iteration", f"{s.rollout_batch_size} episodes, at most {length} tokens each"),
        ("ppo update", f"{steps} optimizer steps of {minibatch} episodes, {piece} at a time"),
        ("ppo in all", f"{episodes} episodes, {steps * s.num_iterations} optimizer steps"),
        ("ppo tokens a step", f"{minibatch * s.response_length} response tokens at most"),
        ("policy trains", trained(model, params, s.trainable)),
        ("critic trains", name(s.value_trainable)),
        *memory_rows(config, model, params),
        ("KV cache", size_of(cache)),
        ("logits of a piece", size_of(logits)),
    ]


def memory_rows(config: Config, model: ModelConfig, params) -> list[tuple[str, str]]:
    """Float32 parameters of the four models. Frozen layers that two of them share count once."""
    s = config.ppo
    policy, policy_trained = count(params), count_trained(model, params, s.trainable)
    depth = (config.reward and config.reward.num_layers) or model.num_layers
    scorer = jax.eval_shape(lambda p: keep_layers(model, p, depth)[1], params)
    scorer_config = dataclasses.replace(model, num_layers=depth)
    critic_trained = count_trained(scorer_config, scorer, s.value_trainable)
    partial = s.trainable != "all" and s.value_trainable != "all"
    scorer_size = critic_trained if partial else count(scorer)
    rows = [
        ("memory, policy", policy),
        ("memory, reference", policy_trained),
        ("memory, critic", scorer_size),
        ("memory, reward model", scorer_size if s.reward_model else 0),
        ("memory, optimizer", 2 * (policy_trained + critic_trained)),
    ]
    return [(label, size_of(4 * number)) for label, number in rows]


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_trained(model: ModelConfig, params, trainable: str | int) -> int:
    start = start_layer(model, trainable)
    split = jax.eval_shape(lambda p: split_params(model, p, trainable, start).trained, params)
    return count(split)


def trained(model: ModelConfig, params, trainable: str | int) -> str:
    return f"{name(trainable)}, {count_trained(model, params, trainable) / 1e6:.1f}M parameters"


def name(trainable: str | int) -> str:
    names = {"all": "all layers", "head": "the head alone"}
    return names[trainable] if trainable in names else f"the top {trainable} layers"


def size_of(number: float) -> str:
    """Bytes, in the unit that suits them."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
