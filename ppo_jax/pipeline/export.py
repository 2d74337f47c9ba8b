"""A finished stage as a Hugging Face folder, which transformers loads with equal outputs.

Dimension key: D model, V vocabulary.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ppo_jax.core.types import Params
from ppo_jax.data.atomic import atomic_folder
from ppo_jax.evaluation.report.model_card import write_card
from ppo_jax.inference.generate import find_sampling
from ppo_jax.io import huggingface as hf
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.base_model import save_tensors
from ppo_jax.io.checkpoints import load_params
from ppo_jax.io.hub import HUB_ID
from ppo_jax.io.peft import write_adapter
from ppo_jax.io.stage_folder import (
    Model,
    check_step,
    describe_stage,
    load_adapters,
    load_model,
    missing_steps,
    split_step,
    stage_config,
    stage_folder,
    with_step,
)
from ppo_jax.models.config import ModelConfig, computation, dtype_name
from ppo_jax.models.families import family_of, write_config
from ppo_jax.rollout.sampling import Sampling

DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5_000_000_000  # of one weight file, as far as its tensors allow
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_stage(
    workdir: str | os.PathLike,
    stage: str,
    out: str | os.PathLike,
    *,
    dtype: DTypeLike = "float32",
    adapter_of: str = "",
) -> None:
    """Write the model of a stage with tokenizer, generation config and model card; or, of a policy
    that was trained with "lora", the adapter alone, as `peft` loads it.

    The folder appears whole or not at all. A policy loads as `AutoModelForCausalLM`, a reward model
    as `AutoModelForSequenceClassification`; see `reward_head` for its missing constant.

    Args:
        workdir: the run's folder.
        stage: "sft", "reward" or "ppo"; "ppo@40" is its checkpoint of step 40,
            "ppo@best" the one that its `keep` has chosen.
        out: the folder to write, which is absent or empty.
        dtype: of the weights, "float32" or "bfloat16", or such a dtype of JAX.
        adapter_of: for the adapter alone, the model that it goes onto: the one that the stage began
            with, as a Hugging Face folder or its id on the hub. "" is the whole model.

    Raises:
        ValueError: the stage is not complete, `out` holds something, the dtype is another, no
            family has a model of this shape, or the adapter is not one of `adapter_of`.
    """
    out, dtype = Path(out).absolute(), dtype_name(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} must be a new or an empty folder, but it holds something already")
    stage = with_step(stage, workdir)
    name, step = split_step(stage)
    source = stage_folder(workdir, name)
    if step is not None:
        check_step(source, step)
    elif missing := missing_steps(source):
        raise ValueError(f"the stage {source} cannot be exported: {missing}")
    if adapter_of:
        config, adapters = load_adapters(source, step)
        family = check_base(adapter_of, source)
        how = dict(config=config, family=family, adapters=adapters, base=adapter_of)
        write = functools.partial(write_adapter, **how)
    else:
        model = load_model(source, step=step)
        how = find_sampling(str(source), model.tokenizer)
        write = functools.partial(write_model, model=model, **how)
    with atomic_folder(out) as folder:
        write(folder, dtype=dtype)
        write_card(folder, Path(workdir), stage, out=out.name, dtype=dtype, adapter_of=adapter_of)


def check_base(path: str, source: Path) -> str:
    """The family of the model that an adapter goes onto.

    Args:
        path: of that model. The shape and weights of a folder are compared, which takes the host's
            memory for both in float32; for a hub id nothing is fetched.
        source: the folder of the stage that trained the adapter.

    Raises:
        ValueError: the adapter is that of a reward model, or goes onto another model, or `path`
            is nothing that peft reads.
    """
    description = describe_stage(source)
    if description["kind"] == "reward":
        raise ValueError(
            "adapter_of is for a policy: the trained head of a reward model has no place in an "
            "adapter; export the whole of it"
        )
    config = stage_config(description)
    family = write_config(config)["model_type"]
    if not os.path.isdir(path):
        message = f"adapter_of must be a Hugging Face folder or a hub id, got {path!r}"
        if os.path.exists(path) or path.endswith(".gguf") or not HUB_ID.fullmatch(path):
            raise ValueError(message)
        # A hub id may look like a path. Where the folder is there, the model in it was meant.
        if "/" in path and Path(path).parent.is_dir():
            raise ValueError(f"{message}, which is not in the folder {Path(path).parent}")
        return family
    beginning = f"adapter_of must be the model that the stage {description['stage']} began with, "
    if hf.load_config(path, **computation(config)) != config:
        raise ValueError(f"{beginning}got {path!r}, which has another shape")
    _, found = hf.load_policy(path, **computation(config))
    if other := other_weights(found, load_params(source / "frozen")):
        raise ValueError(f"{beginning}got {path!r}, which has other weights, such as {other}")
    # It may be another family than the stage's, with other names of modules.
    return hf.read_config_json(Path(path))["model_type"]


def other_weights(found: Params, expected: Params) -> str:
    """The first parameter that differs, even rounded to bfloat16 as an export may be; "" is none.

    An update changes the bfloat16 of at least a few elements of a matrix."""
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        if (np.asarray(a, jnp.bfloat16) != np.asarray(b, jnp.bfloat16)).any():
            return jax.tree_util.keystr(path, simple=True, separator=".")
    return ""


def write_model(
    folder: Path, model: Model, *, dtype: str, sampling: Sampling, temperature: float
) -> None:
    """All but the card: weights, config.json, tokenizer, and how to sample a policy."""
    if model.kind == "reward":
        model = padded(model, sampling.eos_ids)
        params, bias = reward_head(model.config, model.params)
        model = dataclasses.replace(model, params=params)
        extra = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "score_bias": bias}
    else:
        extra = {}
        numbers = generation_config(model.tokenizer, sampling, temperature)
        write_json(folder / "generation_config.json", numbers)
    raw = write_config(model.config)
    family, tokenizer = raw["model_type"], model.tokenizer
    about = {"architectures": [family_of(family).class_name(model.kind)], "torch_dtype": dtype}
    ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    write_json(folder / "config.json", about | raw | ids | extra)
    write_weights(folder, named_tensors(model, family), dtype=dtype)
    tokenizer.padding_side = "right" if model.kind == "reward" else "left"
    vocabulary.save_tokenizer(tokenizer, folder)


def padded(model: Model, ends: tuple[int, ...]) -> Model:
    """The same model with a padding token of its own, for which the token table may grow by rows.

    transformers reads a score at the last token that is not padding: with EOS for padding, it would
    be read before EOS.
    """
    tokenizer = vocabulary.with_padding(model.tokenizer, ends)
    tokens = model.params["embed"]["tokens"]
    more = max(0, vocabulary.table_size(tokenizer) - len(tokens))
    embed = {**model.params["embed"], "tokens": np.pad(tokens, ((0, more), (0, 0)))}
    return dataclasses.replace(
        model,
        tokenizer=tokenizer,
        params={**model.params, "embed": embed},
        config=dataclasses.replace(model.config, vocab_size=len(tokens) + more),
    )


def reward_head(config: ModelConfig, params: Params) -> tuple[Params, float]:
    """A reward model whose head needs no bias, and the constant that its scores then lack.

    The score head of transformers has none. After LayerNorm nothing is lost: its bias c takes the
    head's up,  w·(n + c + w b / |w|²) = w·(n + c) + b.  RMSNorm has no place for it: there b is
    left over, score = logits + b.
    """
    kernel, bias = params["head"]["kernel"], float(params["head"]["bias"][0])
    if config.norm != "layernorm":
        return params, bias
    shift = kernel[:, 0] * (bias / np.square(kernel).sum())
    norm = {**params["final_norm"], "bias": params["final_norm"]["bias"] + shift}
    return {**params, "final_norm": norm}, 0.0


def generation_config(tokenizer: Any, sampling: Sampling, temperature: float) -> dict[str, Any]:
    """The content of generation_config.json: sampling as in the run. top_k=0 is off there, too."""
    padding, strings = tokenizer.pad_token_id, sampling.stop_strings
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(sampling.eos_ids),
        "pad_token_id": tokenizer.eos_token_id if padding is None else padding,
        "do_sample": True,
        "temperature": temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_new_tokens": sampling.response_length,
        **({"stop_strings": list(strings.texts)} if strings else {}),
    }


def named_tensors(model: Model, family: str) -> dict[str, np.ndarray]:
    """The parameters under the names of a checkpoint; a reward model's head [D, 1] as [1, D]."""
    if model.kind == "policy":
        return hf.params_to_hf(model.config, family, model.params)
    body = {name: part for name, part in model.params.items() if name != "head"}
    score = np.ascontiguousarray(model.params["head"]["kernel"].T)
    return {**hf.params_to_hf(model.config, family, body), "score.weight": score}


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], *, dtype: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write one safetensors file, or several with their index where one would be too large."""
    size = jnp.dtype(dtype).itemsize
    shards = list(split(tensors, shard_bytes // size))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        part = {key: tensors[key].astype(jnp.dtype(dtype)) for key in keys}
        save_tensors(part, folder / name)
    if len(shards) > 1:
        total = size * sum(tensor.size for tensor in tensors.values())
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        write_json(folder / hf.INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def split(tensors: Mapping[str, np.ndarray], most: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most `most` numbers or of a single tensor."""
    group, count = [], 0
    for name, tensor in tensors.items():
        if group and count + tensor.size > most:
            yield group
            group, count = [], 0
        group.append(name)
        count += tensor.size
    yield group


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
