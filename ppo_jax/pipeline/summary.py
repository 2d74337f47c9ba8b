"""What follows from a config, as one table at the start of a run."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ppo_jax.config.objectives import (
    AVERAGE,
    advantage_function,
    needs_critic,
    needs_greedy,
)
from ppo_jax.config.ppo import PPOSettings, names_critic
from ppo_jax.config.run import STAGE_NAMES, Config
from ppo_jax.config.stages import LoRASettings
from ppo_jax.core import named as by_name
from ppo_jax.core.network import merge_params
from ppo_jax.data.chat import Chat
from ppo_jax.data.encode import token_rows, unpadded
from ppo_jax.data.probes import ASSISTANT, USER
from ppo_jax.data.prompts import PromptData
from ppo_jax.distributed.layout import Layout, make_layouts
from ppo_jax.inference.generate import make_sampling
from ppo_jax.inference.score import encode_responses
from ppo_jax.io.model_spec import ModelSpec, other_specs, parameters, reread_reason
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import init_lora
from ppo_jax.models.partition import split_params, start_layer
from ppo_jax.pipeline.preflight import share_of_a_device
from ppo_jax.training.common import count_steps
from ppo_jax.training.ppo_setup import critic_source, zero_head

Rows = list[tuple[str, str]]


def summary(
    config: Config, starts: Mapping[str, ModelSpec], stages: Sequence[str], data: Mapping[str, Any]
) -> str:
    """A table of two columns."""
    steps = stage_steps(config, data)
    rows = mesh_rows(make_layouts(config.mesh)[0], next(iter(starts.values())))
    if "sft" in stages:
        rows += sft_rows(config, starts["sft"], steps["sft"])
    if "reward" in stages:
        rows += reward_rows(config, starts["reward"], steps["reward"])
    if "ppo" in stages:
        rows += ppo_rows(config.ppo, starts["ppo"].config)
        rows += evaluation_rows(config)
        score, others = starts.get("score"), other_specs(starts)
        rows += memory_rows(config.ppo, starts["ppo"], score, starts.get("critic"), others)
        rows += text_reward_rows(config.ppo, starts["ppo"], starts.get("score"), data["ppo"])
        rows += stop_rows(config.ppo, starts["ppo"].tokenizer)
    if "evaluate" in stages:
        rows += [("evaluation", f"{config.evaluate.num_prompts} prompts")]
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {value}" for label, value in rows]
    if "ppo" in stages:
        lines += text_reward_lines(config.ppo, starts["ppo"], starts.get("score"), data["ppo"])
        lines += stop_lines(config.ppo, starts["ppo"].tokenizer, data["ppo"].texts)
    return "\n".join([*lines, *warm_up_lines(config, steps)])


def stage_steps(config: Config, data: Mapping[str, Any]) -> dict[str, int]:
    """How many steps each stage has that `data` is of; iterations in PPO."""
    steps = {"ppo": config.ppo.num_iterations} if "ppo" in data else {}
    if "sft" in data:
        steps["sft"] = count_steps(config.sft, len(data["sft"][0].tokens))
    if "reward" in data:
        steps["reward"] = count_steps(config.reward, data["reward"][0].num_rows)
    return steps


def warm_up_lines(config: Config, steps: Mapping[str, int]) -> list[str]:
    """A line for each stage that is over before its learning rate has risen."""
    warm_up = {stage: getattr(config, stage).optimizer.warmup_steps for stage in steps}
    return [
        f"{stage}: warmup_steps={warm_up[stage]}, but the stage has {steps[stage]} "
        f"{'iterations' if stage == 'ppo' else 'steps'}: the learning rate never reaches its height"
        for stage in STAGE_NAMES
        if stage in steps and warm_up[stage] >= steps[stage]
    ]


def mesh_rows(layout: Layout, shape: ModelSpec) -> Rows:
    devices = layout.mesh.devices.flatten()
    rows = [("devices", f"{len(devices)} x {devices[0].device_kind}; sizes are of all together")]
    if len(devices) == 1:
        return rows
    sizes = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    share = 1 / share_of_a_device(layout, shape)
    what = f"1/{layout.num_shards('batch')} of the rows, 1/{share:.1f} of the parameters"
    return [*rows, ("mesh", sizes), ("a device has", what)]


def sft_rows(config: Config, start: ModelSpec, steps: int) -> Rows:
    s = config.sft
    unit = "rows of texts" if s.packing else "texts"
    most = s.batch_size * min(s.max_length, start.config.max_length)
    params = shapes_with_adapters(parameters(start), start.config, s.trainable, s.lora)
    memory = count(params) + 2 * count_trained(start.config, params, s.trainable)
    return [
        ("sft starts from", describe(start)),
        ("sft batch", f"{s.batch_size} {unit}, at most {most} tokens a step"),
        ("sft steps", f"{steps}, {s.num_epochs:g} passes over the data"),
        ("sft trains", trained(start.config, params, s.trainable)),
        ("sft memory", f"{size_of(4 * memory)}, parameters and Adam's two moments"),
    ]


def reward_rows(config: Config, start: ModelSpec, steps: int) -> Rows:
    s = config.reward
    depth = s.num_layers or start.config.num_layers
    shape = dataclasses.replace(start.config, num_layers=depth)
    params = parameters(dataclasses.replace(start, kind="reward", config=shape))
    params = shapes_with_adapters(params, shape, s.trainable, s.lora)
    pairs = f", {s.pairs_per_batch} comparisons" if s.format == "ratings" else ""
    most = s.batch_size * min(s.max_length, start.config.max_length)
    memory = count(params) + 2 * count_trained(shape, params, s.trainable)
    return [
        ("reward starts from", f"{describe(start)}; keeps {depth} layers"),
        ("reward batch", f"{s.batch_size} texts{pairs}, at most {most} tokens"),
        ("reward steps", f"{steps}, {s.num_epochs:g} passes over the data"),
        ("reward trains", trained(shape, params, s.trainable)),
        ("reward memory", f"{size_of(4 * memory)}, parameters and Adam's two moments"),
    ]


def ppo_rows(s: PPOSettings, model: ModelConfig) -> Rows:
    steps = s.num_epochs * s.num_minibatches
    minibatch = s.update_batch_size // s.num_minibatches
    micro_batch = minibatch // s.num_micro_batches
    length = s.max_prompt_length + s.response_length
    episodes = s.rollout_batch_size * s.num_iterations
    heads = 2 * model.num_kv_heads * model.head_dim
    places = sum(model.cache_slots(model.kind_of(i), length) for i in range(model.num_layers))
    most = max(s.rollout_batch_size, num_prompts(s) * s.reference_responses)
    slots, size = s.max_concurrent or most, 4 if model.dtype == "float32" else 2
    cache = slots * places * heads * size
    unit = "packed rows " if s.packing else ""
    logits = micro_batch * s.response_length * model.vocab_size * 4
    return [
        ("ppo iteration", f"{s.rollout_batch_size} episodes, at most {length} tokens each"),
        (
            "ppo update",
            f"{steps} optimizer steps of {minibatch} episodes, {micro_batch} {unit}at a time",
        ),
        *other_rollout_rows(s),
        *rollout_rows(s),
        *critic_rows(s),
        *selection_rows(s),
        *warmup_rows(s),
        *unread_rows(s),
        ("ppo in all", f"{episodes} episodes, {steps * s.num_iterations} optimizer steps"),
        ("ppo tokens a step", f"{minibatch * s.response_length} response tokens at most"),
        ("KV cache", f"{size_of(cache)}, {slots} responses at a time"),
        ("logits at a time", size_of(logits)),
    ]


def num_prompts(s: PPOSettings) -> int:
    """Of an iteration."""
    return s.rollout_batch_size // s.samples_per_prompt


def other_rollout_rows(s: PPOSettings) -> Rows:
    """The rollouts besides that of the policy: what some advantages need, and PAR."""
    rows, count, each = [], num_prompts(s), s.reference_responses
    if needs_greedy(s.advantage):
        rows += [("greedy responses", f"{count} more an iteration, one to each prompt")]
    if each:
        how_many = f"{count * each} more an iteration, {each} to each prompt"
        rows += [("reference responses", how_many)]
    return rows


def scored_responses(s: PPOSettings) -> int:
    """The most in an iteration, of the policy and of `other_rollout_rows`."""
    others = num_prompts(s) * (needs_greedy(s.advantage) + s.reference_responses)
    return s.rollout_batch_size * s.max_rollouts + others


def rollout_rows(s: PPOSettings) -> Rows:
    """How often an iteration samples, where it replaces groups of equal scores."""
    if s.max_rollouts == 1:
        return []
    of = f"until scores vary in the groups of {s.rollout_batch_size} responses"
    return [("dynamic sampling", f"at most {s.max_rollouts} rollouts an iteration, {of}")]


def warmup_rows(s: PPOSettings) -> Rows:
    """How long the critic alone learns."""
    if not s.critic_warmup:
        return []
    count, most = s.critic_warmup, "at most " if s.critic_warmup_tolerance else ""
    first = "the first iteration" if count == 1 else f"the first {count} iterations"
    if count >= s.num_iterations:
        first = "all iterations"
    return [("critic warm-up", f"{most}{first}, in which the policy stays as it is")]


def critic_rows(s: PPOSettings) -> Rows:
    """The steps of a critic that takes some of its own."""
    if not s.critic_has_optimizer:
        return []
    minibatches = s.value_num_minibatches or s.num_minibatches
    steps, size = s.num_epochs * s.value_updates * minibatches, s.update_batch_size // minibatches
    return [("critic update", f"{steps} optimizer steps of its own, of {size} episodes")]


def selection_rows(s: PPOSettings) -> Rows:
    """Which responses are learned from, where not all are."""
    if not s.keep_samples:
        return []
    half = s.keep_samples // 2
    what = f"the {half} best and the {half} worst of {s.samples_per_prompt} responses to a prompt"
    return [("ppo learns from", what)]


def unread_rows(s: PPOSettings) -> Rows:
    """Numbers that are given, and that a choice beside them leaves unread."""
    unread = {"missing_eos_score": s.missing_eos == "keep" and "missing_eos='keep'"}
    why = "kl_control='fixed'" if s.kl_control == "fixed" else "kl_coef=0, which stays 0"
    still = (s.kl_control == "fixed" or s.kl_coef == 0) and why
    unread |= {"target_kl": still, "kl_horizon": still}
    given = [k for k, why in unread.items() if why and getattr(s, k) != getattr(type(s), k)]
    return [("not read", ", ".join(f"{k} ({unread[k]})" for k in given))] if given else []


def evaluation_rows(config: Config) -> Rows:
    """What is measured while PPO trains."""
    s = config.ppo
    if not s.evaluate_every:
        return []
    every = "iteration" if s.evaluate_every == 1 else f"{s.evaluate_every} iterations"
    what = f"every {every}: {s.evaluate_prompts} prompts, {config.evaluate.judges}"
    return [("ppo evaluates", what)]


def stop_rows(s: PPOSettings, tokenizer: Any) -> Rows:
    """What ends a response, where it is more than the tokenizer's EOS."""
    sampling = make_sampling(vars(s), tokenizer)
    if not sampling.other_ends(tokenizer.eos_token_id):
        return []
    tokens = tokenizer.convert_ids_to_tokens(list(sampling.eos_ids))
    texts = sampling.stop_strings.texts if sampling.stop_strings else ()
    return [("responses end with", ", ".join([*tokens, *(f"the text {x!r}" for x in texts)]))]


def stop_lines(s: PPOSettings, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Lines for ends that the reward model does not know, and for turns that do not end."""
    sampling, eos, lines = make_sampling(vars(s), tokenizer), tokenizer.eos_token, []
    if s.reward_model and sampling.other_ends(tokenizer.eos_token_id):
        where = {
            "eos": f"at {eos}, put behind a response that ends otherwise",
            "last": "at their last token, whatever it is",
        }
        lines.append(
            f"ppo: responses may end with another token than {eos}, with which the reward model's "
            f"texts end: it reads them {where[s.score_at]} (ppo.score_at)"
        )
    end = turn_end(tokenizer, prompts)
    if end is not None and end not in tokenizer.convert_ids_to_tokens(list(sampling.eos_ids)):
        lines.append(
            f"ppo: a turn of the chat template ends with {end}, which ends no response; name it in "
            "ppo.stop_tokens, or responses go on behind it"
        )
    return lines


def turn_end(tokenizer: Any, prompts: Sequence[str]) -> str | None:
    """The token that ends an assistant's turn, where some of the prompts are of the chat template;
    None where there is no such token."""
    content, chat = "0123456789", Chat(tokenizer)
    try:
        asked = chat.prompt([{"role": "user", "content": content}], "").rpartition(content)[2]
        outline = chat.outline((USER, ASSISTANT))
    except ValueError:  # no template, or one that refuses these messages
        return None
    if outline is None or not any(asked and prompt.endswith(asked) for prompt in prompts):
        return None
    ends = chat.end_tokens(outline.after[: outline.end])
    return ends[-1].group() if ends else None


def memory_rows(
    s: PPOSettings,
    policy: ModelSpec,
    score: ModelSpec | None,
    named: ModelSpec | None = None,
    others: Sequence[ModelSpec] = (),
) -> Rows:
    """Float32 parameters of the models. Frozen layers that two of them share count once, unless
    one of the two is trained whole: at most so much, then."""
    params = shapes_with_adapters(parameters(policy), policy.config, s.trainable, s.lora)
    policy_trained = count_trained(policy.config, params, s.trainable)
    trains = [("policy trains", trained(policy.config, params, s.trainable))]
    memory = {
        "policy": count(params),
        "reference": 0 if s.trainable == "lora" else policy_trained,
    }
    if s.reference_moves:
        memory["moving reference"] = policy_trained
    scorer = 0 if score is None else count(parameters(score))
    alone = score is None or bool(reread_reason(policy, score))  # shares no layer
    critic, held, critic_trained = critic_rows_and_memory(s, policy, score, named)
    trains += critic
    if needs_critic(s.advantage):
        memory["critic"] = held
    of_critic = needs_critic(s.advantage) and not s.shared_critic
    parts = [s.trainable, s.value_trainable] if of_critic else [s.trainable]
    if not alone and named is None and not {"all", "lora"} & set(parts):  # the top layers of all
        scorer = min(scorer, count_trained(score.config, parameters(score), parts[-1]))
    if others:
        counted = [score] if s.reward_rule == AVERAGE else [score, *others]
        memory["reward models"] = sum(count(parameters(spec)) for spec in counted)
        trains += [("score", f"{s.reward_rule} of {1 + len(others)} reward models")]
    elif score is not None:
        memory["reward model"] = scorer
    memory["optimizer"] = 2 * (policy_trained + critic_trained)
    return [
        ("ppo starts from", describe(policy)),
        *trains,
        *((f"memory, {name}", size_of(4 * number)) for name, number in memory.items()),
    ]


def critic_rows_and_memory(
    s: PPOSettings, policy: ModelSpec, score: ModelSpec | None, named: ModelSpec | None
) -> tuple[Rows, int, int]:
    """(rows on the critic, the number of its parameters that are in memory for it alone, the number
    of those that are trained)."""
    if not needs_critic(s.advantage):
        unread = ["value_trainable", "value_learning_rate", "vf_coef", "value_clip_range"]
        unread += {"gae_lambda"} - by_name.parameters(advantage_function(s.advantage)).keys()
        return [("without a critic", f"{', '.join(unread)} are not read")], 0, 0
    several = f"{s.num_critics} with random heads; each learns one prompt in {s.num_critics}"
    rows = [("critics", several)] if s.num_critics > 1 else []
    if s.shared_critic:
        size = s.num_critics * count(zero_head(policy.config, s.value_bins))
        row = f"{size:,} parameters, a head on the policy's body, which its loss trains as well"
        return [*bin_rows(s, policy), *rows, ("critic trains", row)], size, size
    critic = critic_source(s, policy, score, named)
    value = parameters(dataclasses.replace(critic, kind="reward"))
    value = {**value, "head": zero_head(critic.config, s.value_bins)}
    value = shapes_with_adapters(value, critic.config, s.value_trainable, s.lora)
    size = count_trained(critic.config, value, s.value_trainable)
    partial = not {s.trainable, s.value_trainable} & {"all", "lora"}  # the top layers of both
    shares = named is None and (partial or s.value_trainable == "lora")
    held = (size if shares else count(value)) + (s.num_critics - 1) * size
    if named is not None:
        rows = [("critic starts from", f"{s.critic_init_from}: {describe(named)}"), *rows]
    trains = ("critic trains", trained(critic.config, value, s.value_trainable))
    return [*rows, *bin_rows(s, critic), trains], held, s.num_critics * size


def bin_rows(s: PPOSettings, start: ModelSpec) -> Rows:
    """What a critic with bins gives, and from which values it begins."""
    if not s.value_bins:
        return []
    low, high = s.value_range
    bins = f"{s.value_bins} bins of returns from {low:g} to {high:g}"
    if not start.value_bins:
        bins += f"; its head is new and zero, so that all values are {(low + high) / 2:g} at first"
    return [("critic gives", bins)]


def text_reward_rows(
    s: PPOSettings, policy: ModelSpec, score: ModelSpec | None, data: PromptData
) -> Rows:
    """What it costs that the reward model reads text, and what it does not see of it."""
    if score is None or not (reason := reread_reason(policy, score)):
        return []
    lengths = data.prompts.mask.sum(axis=1)
    sample = slice(0, 64)
    began = time.perf_counter()
    prompts = unpadded(data.prompts.tokens[sample], data.prompts.mask[sample])
    texts = policy.tokenizer.batch_decode(prompts)
    encode_responses(data.texts[sample], [""] * len(texts), [True] * len(texts), score)
    a_token = (time.perf_counter() - began) / lengths[sample].sum()
    responses, most = scored_responses(s), "at most " if s.max_rollouts > 1 else ""
    seconds = a_token * responses * (lengths.mean() + s.response_length)
    cost = (
        f"{most}{responses} responses an iteration are decoded and tokenised again between "
        f"two programs, about {seconds:.2g} s; no layer is shared"
    )
    rows = [("reward model", describe(score)), ("reward model reads", f"text, as {reason}: {cost}")]
    if needs_critic(s.advantage) and not names_critic(s) and not s.shared_critic:
        rows.append(("critic starts as", "the policy with a head of zeros: it reads tokens"))
    return rows


def text_reward_lines(
    s: PPOSettings, policy: ModelSpec, score: ModelSpec | None, data: PromptData
) -> list[str]:
    """A line for what a reward model that reads text does not see of the prompts as they are."""
    if score is None or not reread_reason(policy, score):
        return []
    ids = token_rows([((x, True),) for x in data.texts], score.tokenizer, append_eos=True)
    room, lines = score.config.max_length - s.response_length, []
    if long := sum(len(row.ids) > room for row in ids):
        lines.append(
            f"ppo: {long} of {len(ids)} prompts have over {room} tokens of the reward model's: "
            f"with a response of {s.response_length} their beginning may be beyond its context of "
            f"{score.config.max_length}, and is not read then (reward/too_long_fraction)"
        )
    special = [str(x) for x in policy.tokenizer.added_tokens_decoder.values() if x.special]
    unknown = [x for x in special if x not in score.tokenizer.get_vocab()]
    if written := [x for x in unknown if any(x in text for text in data.texts)]:
        lines.append(
            f"ppo: the prompts have {', '.join(written)}, which the reward model's tokenizer does "
            "not know as tokens: it reads them letter by letter"
        )
    return lines


def describe(start: ModelSpec) -> str:
    model, title = start.config, start.title or f"{start.kind} model"
    return (
        f"a {title} of {rounded(count(parameters(start)))} parameters, "
        f"{model.num_layers} layers x {model.embed_dim}, {model.vocab_size} tokens, "
        f"context {model.max_length}"
    )


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_trained(model: ModelConfig, params, trainable: str | int) -> int:
    start = start_layer(model, trainable)
    split = jax.eval_shape(lambda p: split_params(model, p, trainable, start).trained, params)
    return count(split)


def shapes_with_adapters(params, model: ModelConfig, trainable: str | int, lora: LoRASettings):
    """The shapes of parameters with those of the adapters, if it is they that are trained."""
    if trainable != "lora":
        return params
    init = functools.partial(init_lora, targets=lora.targets, rank=lora.rank)
    adapters = jax.eval_shape(lambda: init(jax.random.key(0), model, params))
    return merge_params(params, adapters)


def trained(model: ModelConfig, params, trainable: str | int) -> str:
    names = {"all": "all layers", "head": "the head alone", "lora": "adapters"}
    what = names.get(trainable, f"the top {trainable} layers")
    return f"{what}, {rounded(count_trained(model, params, trainable))} parameters"


def rounded(number: int) -> str:
    """For a reader: 134.5M, 28k, 33."""
    if number >= 999_500:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.0f}k" if number >= 1e3 else str(number)


def size_of(number: float) -> str:
    """Bytes, in the unit that suits them."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
