"""Text generation: responses of a policy to prompts, in batches or as a stream of tokens."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.config.parsing import convert, filled_in, hints_of, with_new_names
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.stages import OptimizerSettings
from ppo_jax.core.checks import assert_counts
from ppo_jax.core.types import Prompts, Rollout
from ppo_jax.data.decode import BROKEN, TextDecoder
from ppo_jax.data.encode import encode_prompts, take_prompts, unpadded
from ppo_jax.distributed.layout import Layout, fetch, one_device
from ppo_jax.inference.stop_strings import stop_ids, stop_strings
from ppo_jax.io.hub import model_folder
from ppo_jax.io.stage_folder import Model, describe_stage
from ppo_jax.io.tokenizers import declared_strings, read_declared_stops
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.rollout.rollout import rollout
from ppo_jax.rollout.sampling import Sampling, choose, find_stops, init_matched

SAMPLING = ("temperature", "response_length", "top_k", "top_p", "min_p")
CHUNK = 4  # tokens that a stream samples in one call
LEAST_WIDTH = 64  # positions of a streamed prompt; each further width is twice as wide
# Responses of one program, in batches. The last ones of a program keep slots waiting: with 8 that
# costs some 6% on lengths that differ much; but a signal waits for the program to end.
BATCHES = 8


def make_sampling(settings: Mapping[str, Any], tokenizer: Any) -> Sampling:
    """The `Sampling` of a rollout from the fields of the ppo section."""
    filters = {name: settings[name] for name in ("response_length", "top_k", "top_p", "min_p")}
    stops = settings["stop_tokens"]
    return Sampling(
        eos_ids=stop_ids(tokenizer, stops),
        stop_strings=stop_strings(tokenizer, stops),
        **filters,
    )


def find_sampling(path: str, tokenizer: Any, **asked: Any) -> dict[str, Any]:
    """How to sample a model: {"sampling", "temperature"}, as `generate` takes them.

    Of temperature, response_length, top_k, top_p and min_p, those that are None or absent are taken
    from the PPO stage of the same run, where the model is a stage's, and else from the defaults of
    the ppo section. Stop tokens and strings of a generation_config.json count, too.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = filled_in(PPOSettings, declared_sampling(path, tokenizer) | asked)
    for name in SAMPLING:
        settings[name] = convert(hints_of(PPOSettings)[name], settings[name], name)
    sampling = make_sampling(settings, tokenizer)
    return {"sampling": sampling, "temperature": settings["temperature"]}


def declared_sampling(path: str, tokenizer: Any) -> dict[str, Any]:
    """Sampling settings in the files beside a model, under the names of the ppo section."""
    if describe_stage(Path(path)) is not None:
        return run_settings(path)
    folder = model_folder(path)
    return {"stop_tokens": read_declared_stops(folder, tokenizer) + declared_strings(folder)}


def run_settings(path: str) -> dict[str, Any]:
    """The ppo section of the run that a stage is of; {} without a PPO stage, or of other models."""
    folder = Path(path)
    stage = describe_stage(folder)
    if stage is not None and stage["stage"] != "ppo":
        folder = folder.parent / "ppo"
        stage = describe_stage(folder)
    if stage is None:
        return {}
    settings = with_new_names(PPOSettings, stage["settings"], warn=False)
    try:
        check_sampling(settings)
    except ValueError as error:
        raise ValueError(f"{folder}/stage.json: settings.{error}") from error
    return PPOSettings.BEFORE | settings


def check_sampling(settings: Mapping[str, Any]):
    """What a stage says of the sampling is as a config may have it.

    Raises:
        ValueError: it is not; names the field.
    """
    hints, given = hints_of(PPOSettings), {}
    for name in (*SAMPLING, "stop_tokens", "score_at"):
        if name in settings:
            given[name] = convert(hints[name], settings[name], name)
    least = {"prompts": "-", "optimizer": OptimizerSettings(learning_rate=0.0)}
    try:
        PPOSettings(**least, **given)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("ppo.")) from error


def decode_rows(
    tokenizer: Any,
    tokens: np.ndarray,
    mask: np.ndarray,
    prompts: Prompts,
    stop_ids: Collection[int],
) -> list[str]:
    """Responses as text, which continues that of their prompts; see `TextDecoder`.

    All that the policy wrote is there, special tokens too, but for the stop token that ends it.

    Args:
        tokenizer: of the policy.
        tokens: [N, T] int, of the responses.
        mask: [N, T] bool.
        prompts: N of them, as numpy.
        stop_ids: of the tokens that end a response.
    """
    decoder = TextDecoder(tokenizer)
    texts = []
    befores = unpadded(prompts.tokens, prompts.mask)
    for before, ids in zip(befores, unpadded(tokens, mask), strict=True):
        ended = bool(ids) and ids[-1] in stop_ids
        texts.append(decoder.text(before, ids[: len(ids) - ended]))
    return texts


@functools.lru_cache(maxsize=8)
def compiled_rollout(config: ModelConfig, sampling: Sampling, layout: Layout):
    """One jitted rollout for all models of a config: base, SFT and PPO compile once."""
    network = policy_network(config, constrain=layout.constrain)

    def sample(params, *args, **kwargs):
        params = layout.decoding_params(params, config.dtype)
        sampled = rollout(network, params, *args, sampling=sampling, **kwargs)
        return dataclasses.replace(sampled, experts=None)  # which nobody reads

    return jax.jit(sample, out_shardings=layout.batch_sharding)


def check_context(config: ModelConfig, prompt_length: int, response_length: int):
    """A model can read a prompt and the whole response to it, both in tokens."""
    if prompt_length + response_length > config.max_length:
        raise ValueError(
            "the longest prompt and response_length must be at most "
            f"{config.max_length} tokens together (the model's context), got "
            f"{prompt_length} + {response_length}"
        )


def program_size(count: int, batch_size: int, pieces: int) -> tuple[int, int]:
    """(rows of each program, how many of them are decoded at a time) for so many prompts.

    The programs are of one size, and at most a quarter of their rows are padding, but for rows that
    fill the pieces of a mesh: with four sizes from a power of two to the next, few programs are
    compiled whatever the number of prompts.

    >>> program_size(256, 64, 1), program_size(65, 64, 1), program_size(1100, 64, 1)
    ((256, 64), (80, 64), (384, 64))
    >>> program_size(1, 64, 1), program_size(3, 2, 1), program_size(7, 3, 4)
    ((1, 1), (3, 2), (8, 4))
    """
    slots = -(-batch_size // pieces) * pieces
    num_programs = -(-count // (BATCHES * slots))
    rows = -(-count // num_programs)
    step = max(1 << rows.bit_length() >> 3, 1)
    rows = -(-rows // step) * step
    rows = -(-rows // pieces) * pieces
    return (rows, slots) if count > slots else (min(rows, slots),) * 2


def in_slots(sampling: Sampling, slots: int, pieces: int) -> Sampling:
    """The same sampling in so many slots (0 is all), of which as many are filled together as the
    pieces of a mesh divide."""
    free = -(-sampling.group(slots) // pieces) * pieces
    return dataclasses.replace(sampling, max_concurrent=slots, min_free_slots=slots and free)


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    max_prompt_length: int = 512,
    layout: Layout | None = None,
    before_batch: Callable[[], None] | None = None,
) -> tuple[list[str], list[Rollout]]:
    """Sample a response to each prompt.

    A response depends on the seed and on its prompt's place in the list, not on `batch_size`. One
    that has ended makes room for the next, see `continuous_batching`: a program takes the prompts
    of up to `BATCHES` batches.

    Args:
        model: a policy.
        prompts: N texts.
        sampling: length, stop tokens and filters; None is up to 64 tokens, as far as the model's
            context goes, to the tokenizer's EOS.
        temperature: 0 is greedy.
        seed: of the sampling.
        batch_size: responses that are decoded at a time, at most `sampling.max_concurrent` where
            that is set.
        max_prompt_length: tokens; a longer prompt is an error.
        layout: of the rollout; None is the first device.
        before_batch: called before each program; it may end the process.

    Returns:
        (N responses, the rollouts of the programs; the last is padded with prompt 0).

    Raises:
        ValueError: the model is no policy, a prompt is too long or has no token, or the model
            cannot read a prompt and a response to its end; a number is out of its range.
    """
    if model.kind != "policy":
        raise ValueError("model must be a policy to generate text, got a reward model")
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got the text {prompts[:40]!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    assert_counts(batch_size=batch_size)
    rows = encode_prompts(prompts, model.tokenizer, max_length=max_prompt_length)
    longest = int(rows.mask.sum(axis=1).max())
    if sampling is None:
        length = max(1, min(64, model.config.max_length - longest))
        sampling = Sampling(response_length=length, eos_ids=stop_ids(model.tokenizer))
    check_context(model.config, longest, sampling.response_length)
    layout = layout or one_device()
    pieces = layout.num_shards("batch")
    slots = min(batch_size, sampling.max_concurrent or batch_size)
    num_rows, slots = program_size(len(prompts), slots, pieces)
    sampling = in_slots(sampling, slots if slots < num_rows else 0, pieces)
    config = model.config.for_rows(longest + sampling.response_length)
    sample = compiled_rollout(config, sampling, layout)
    # On a mesh the program itself casts and reshards them for the rollout.
    params = model.params if model.layout else layout.shard_params(model.params)
    key, temperature = layout.replicate((jax.random.key(seed), np.float32(temperature)))
    responses, rollouts = [], []
    for begin in range(0, len(prompts), num_rows):
        if before_batch is not None:
            before_batch()
        numbers = np.arange(begin, begin + num_rows)
        chosen = np.where(numbers < len(prompts), numbers, 0)
        asked = take_prompts(rows, chosen, longest)
        batch, numbers = layout.shard_batch((asked, numbers))
        sampled = sample(params, batch, key, temperature=temperature, rows=numbers)
        tokens, mask = fetch((sampled.response_tokens, sampled.response_mask))
        responses += decode_rows(model.tokenizer, tokens, mask, asked, sampling.eos_ids)
        rollouts.append(sampled)
    return responses[: len(prompts)], rollouts


@functools.lru_cache(maxsize=8)
def compiled_stream(config: ModelConfig, sampling: Sampling):
    """(prefill, decode): a prompt to the state before its response, and the next `CHUNK` tokens.

    The state is (t, logits [1, V], cache, state of the stop strings). Compiled once for each width
    of the prompt.
    """
    network = policy_network(config)

    def prefill(params, tokens, mask):
        width = tokens.shape[1]
        # The last chunk may exceed the response; its surplus is discarded.
        cache = network.init_cache(1, width + sampling.response_length + CHUNK)
        logits, cache = network.decode(params, tokens, mask, cache, first_output=width - 1)
        return jnp.int32(0), logits[:, 0], cache, init_matched(1, sampling)

    def decode(params, state, key, temperature):
        row_keys = jax.random.fold_in(key, 0)[None]  # as the first row of a rollout

        def step(state, _):
            t, logits, cache, matched = state
            token, _ = choose(logits, row_keys, t, sampling, temperature)
            stops, matched = find_stops(token, matched, sampling)
            mask = jnp.ones((1, 1), bool)
            logits, cache = network.decode(params, token[:, None], mask, cache)
            return (t + 1, logits[:, 0], cache, matched), (token[0], stops[0])

        return jax.lax.scan(step, state, length=CHUNK)

    return jax.jit(prefill), jax.jit(decode, donate_argnums=1)


def stream(
    model: Model,
    ids: Sequence[int],
    key: jax.Array,
    *,
    sampling: Sampling,
    temperature: float,
) -> Iterator[int]:
    """The tokens of one response as they are sampled, the one that ends it included.

    They are those of a rollout with this prompt alone, whose tokens `ids` and response fit into the
    model's context. For several responses put the policy's parameters on the device first.
    """
    width = min(prompt_width(len(ids)), model.config.max_length)
    tokens = np.zeros((1, width), np.int32)
    tokens[0, width - len(ids) :] = ids
    mask = np.arange(width)[None] >= width - len(ids)
    config = model.config.for_rows(len(ids) + sampling.response_length)
    prefill, decode = compiled_stream(config, sampling)
    params = jax.device_put(model.params)
    state = prefill(params, tokens, mask)
    for t in range(0, sampling.response_length, CHUNK):
        state, chunk = decode(params, state, key, jnp.float32(temperature))
        rows = np.stack(jax.device_get(chunk), axis=1)[: sampling.response_length - t]
        for token, stops in rows.tolist():
            yield token
            if stops:
                return


def prompt_width(length: int) -> int:
    """The least of few widths that holds a prompt, so that few programs are compiled.

    >>> [prompt_width(length) for length in (1, 64, 65, 300)]
    [64, 64, 128, 512]
    """
    return LEAST_WIDTH << ((length - 1) // LEAST_WIDTH).bit_length()


def decode_stream(
    tokenizer: Any,
    tokens: Iterable[int],
    before: Sequence[int] = (),
    stop_ids: Collection[int] = (),
) -> Iterator[str]:
    """The text of tokens as they come; a character is yielded once all of its bytes are there.

    Args:
        tokenizer: of the policy.
        tokens: of a response, one after the other.
        before: the tokens of its prompt.
        stop_ids: of the tokens that end a response, which have no text.
    """
    decoder, ids, done, text = TextDecoder(tokenizer), [], 0, ""
    for token in itertools.takewhile(lambda token: token not in stop_ids, tokens):
        ids.append(token)
        text = decoder.text(before, ids)
        if not text.endswith(BROKEN):
            yield text[done:]
            done = len(text)
    yield text[done:]
