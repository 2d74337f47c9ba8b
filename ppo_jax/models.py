"""Whole models on disk: the base model of a run, and what each stage leaves.

A stage folder holds `stage.json` (what it is), `tokenizer/`, `frozen/` (parameters that the stage
does not train, written once) and `checkpoints/` (the trained ones, step by step).
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ppo_jax import hf, vocabulary
from ppo_jax.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from ppo_jax.config import STAGES, ModelSettings, ScratchSettings
from ppo_jax.data import load_demonstrations
from ppo_jax.networks import ModelConfig, Params, RopeScaling, policy_network
from ppo_jax.partition import Parts, merge_params, stack_layers, unstack_layers
from ppo_jax.sources import model_folder

FIELD_OF_STAGE = {"sft": "params", "reward": "params", "ppo": "policy_params"}
DESCRIPTION = {"stage", "kind", "model", "frozen", "settings", "num_steps"}  # keys of stage.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with all of its parameters, on the host."""

    kind: str  # "policy" or "reward"
    config: ModelConfig
    params: Params
    tokenizer: Any


def load_model(path: str | os.PathLike, settings: ModelSettings | None = None) -> Model:
    """A model from a stage folder, or a policy from anything that `hf.load_policy` reads.

    Args:
        path: the folder, file or name.
        settings: how to compute with it (dtype, scan_layers); None is float32, or as the stage did.

    Raises:
        ValueError: there is no complete model at `path`.
    """
    if (Path(path) / "stage.json").is_file():
        model = load_stage(Path(path))
        return model if settings is None else compute_as(model, settings)
    how = {}
    if settings is not None:
        how = {"dtype": settings.dtype, "scan_layers": settings.scan_layers}
    config, params = hf.load_policy(path, **how)
    tokenizer = vocabulary.load_tokenizer(path)
    check_tokenizer(tokenizer, config, path)
    return Model(kind="policy", config=config, params=params, tokenizer=tokenizer)


def compute_as(model: Model, settings: ModelSettings) -> Model:
    """The same model with the dtype and the layout of layers that the settings ask for."""
    how = {"dtype": settings.dtype, "scan_layers": settings.scan_layers}
    params = model.params
    if model.config.scan_layers != settings.scan_layers:
        change = stack_layers if settings.scan_layers else unstack_layers
        params = jax.tree.map(np.asarray, change(params))
    config = dataclasses.replace(model.config, **how)
    return dataclasses.replace(model, config=config, params=params)


def check_tokenizer(tokenizer: Any, config: ModelConfig, path: Any):
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        )


def resolve(name: str, workdir: Path, base: str) -> str:
    """The path that `init_from` or `reward_model` stands for.

    "base" is the base model, the name of a stage is that stage of this workdir, anything else is
    a path of its own.
    """
    if name == "base":
        return base
    return str(workdir / name) if name in STAGES else name


def describe_stage(folder: Path) -> dict | None:
    """What `stage.json` says, or None where there is none.

    Raises:
        ValueError: it is not as a stage writes it.
    """
    path = folder / "stage.json"
    if not path.is_file():
        return None
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    keys = set(description) if isinstance(description, dict) else set()
    if missing := sorted(DESCRIPTION - keys):
        raise ValueError(f"{path} must be as a stage writes it, but lacks {missing}")
    return description


def begin_stage(folder: Path, model: Model, parts: Parts, description: dict):
    """Write what does not change while a stage trains; `stage.json` comes last, when all is there.

    Args:
        folder: the stage's folder.
        model: what the stage starts from; its kind is the kind of the result.
        parts: its parameters, split.
        description: the stage's name and settings, kept in stage.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save_tokenizer(model.tokenizer, folder / "tokenizer")
    frozen = merge_params(parts.trunk, parts.frozen)
    if frozen:
        save_params(folder / "frozen", frozen)
    of_model = {"kind": model.kind, "model": dataclasses.asdict(model.config)}
    write_description(folder, description | of_model | {"frozen": bool(frozen)})


def update_stage(folder: Path, description: dict):
    """Settings that may change, and the number of steps, as the resumed run has them."""
    old = describe_stage(folder)
    if old | description != old:
        write_description(folder, old | description)


def write_description(folder: Path, description: dict):
    temporary = folder / "stage.json.tmp"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    temporary.replace(folder / "stage.json")


def missing_steps(folder: Path) -> str | None:
    """What a stage lacks to be complete, or None when its last step can be read."""
    description = describe_stage(folder)
    if description is None:
        return "it has not begun"
    step, last = Checkpoints(folder / "checkpoints").readable_step(), description["num_steps"]
    return None if (step or 0) >= last else f"it has {step or 0} of {last} steps"


def load_source(name: str, workdir: Path, base: str, settings: ModelSettings) -> Model:
    """The model that a stage starts from; a stage must be complete.

    Args:
        name: `init_from` or `reward_model`.
        workdir: the run's folder.
        base: path of the base model.
        settings: how to compute with it.

    Raises:
        ValueError: the stage is not complete: half of a training is seldom meant.
    """
    path = resolve(name, workdir, base)
    if describe_stage(Path(path)) and (missing := missing_steps(Path(path))):
        raise ValueError(f"the stage {path} is not complete: {missing}. Run it to its end first.")
    return load_model(path, settings)


def stage_config(description: dict) -> ModelConfig:
    """The shape of a stage's model, out of its `stage.json`."""
    values = dict(description["model"])
    scaling = values.pop("rope_scaling")
    return ModelConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None)


def load_stage(folder: Path) -> Model:
    """The model of a stage, at its newest complete checkpoint."""
    description = describe_stage(folder)
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: run the stage first")
    trained = load_checkpoint_item(checkpoints, FIELD_OF_STAGE[description["stage"]])
    frozen = load_params(folder / "frozen") if description["frozen"] else {}
    return Model(
        kind=description["kind"],
        config=stage_config(description),
        params=jax.tree.map(np.asarray, merge_params(frozen, trained)),
        tokenizer=vocabulary.load_tokenizer(folder / "tokenizer"),
    )


def prepare_base(settings: ModelSettings, folder: Path, seed: int) -> str:
    """The path of the base model, made first where it has to be made.

    With a vocabulary to trim, or from scratch, the base model is written once into `folder` as a
    Hugging Face folder; otherwise it is used where it lies.

    Args:
        settings: the model section.
        folder: where a made model goes.
        seed: of the weights from scratch.
    """
    if not settings.vocabulary_data:
        return settings.path
    if not folder.is_dir():
        tokenizer = None if settings.scratch else vocabulary.load_tokenizer(settings.path)
        records = load_demonstrations(settings.vocabulary_data, tokenizer)
        texts = [text for record in records for text, _ in record.parts]
        make = trimmed_model if settings.scratch is None else scratch_model
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            make(settings, temporary, texts, seed)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def trimmed_model(settings: ModelSettings, folder: Path, texts: list[str], seed: int):
    """A pretrained model with the tokens that the texts use, and those that any text needs."""
    del seed  # nothing is drawn
    config, params = hf.load_policy(settings.path)
    tokenizer = vocabulary.load_tokenizer(settings.path)
    try:
        tokenizer, kept = vocabulary.trim_vocabulary(tokenizer, texts)
    except ValueError as error:
        what = f"model.vocabulary_data must be '' for {settings.path}"
        raise ValueError(f"{what}: {error}") from error
    raw = hf.read_json(model_folder(settings.path))
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(raw.get(name), int):
            raw[name] = new_id.get(raw[name])
        elif isinstance(raw.get(name), list):
            raw[name] = [new_id[i] for i in raw[name] if i in new_id]
    config = dataclasses.replace(config, vocab_size=len(kept))
    raw["vocab_size"] = len(kept)
    write_folder(folder, raw, config, vocabulary.trim_params(params, kept), tokenizer)


def scratch_model(settings: ModelSettings, folder: Path, texts: list[str], seed: int):
    """A small Llama with random weights and a tokenizer of its own."""
    tokenizer = vocabulary.train_tokenizer(texts, settings.scratch.vocab_size)
    raw = llama_config(settings.scratch, len(tokenizer), tokenizer.eos_token_id)
    config = hf.read_config(raw)
    params = policy_network(config).init(jax.random.key(seed))
    write_folder(folder, raw, config, jax.tree.map(np.asarray, params), tokenizer)


def llama_config(scratch: ScratchSettings, vocab_size: int, eos_token_id: int) -> dict:
    """The config.json of a model from scratch."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": scratch.embed_dim,
        "intermediate_size": scratch.mlp_dim,
        "num_hidden_layers": scratch.num_layers,
        "num_attention_heads": scratch.num_heads,
        "num_key_value_heads": scratch.num_heads,
        "max_position_embeddings": scratch.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def write_folder(folder: Path, raw: dict, config: ModelConfig, params: Params, tokenizer: Any):
    """A policy as a Hugging Face folder; `raw` is its config.json."""
    tensors = hf.params_to_hf(config, raw["model_type"], params)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    vocabulary.save_tokenizer(tokenizer, folder)
