"""Models on disk: what each stage saves, and what it starts from.

A stage folder holds `stage.json` (what it is), `tokenizer/`, `frozen/` (parameters that the stage
does not train, written once) and `checkpoints/` (the trained ones, step by step).
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.config.parsing import build
from ppo_jax.config.run import STAGE_NAMES, ModelSettings
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import Params
from ppo_jax.data.atomic import atomic_write, naming_file
from ppo_jax.data.readers import short_repr
from ppo_jax.distributed.layout import Layout
from ppo_jax.distributed.processes import on_primary
from ppo_jax.io import huggingface as hf
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import (
    Checkpoints,
    Shardings,
    load_checkpoint_item,
    load_params,
    save_params,
)
from ppo_jax.io.hub import model_folder
from ppo_jax.io.run_folder import read_object, read_rows
from ppo_jax.models.config import Experts, LayerKind, ModelConfig, computation
from ppo_jax.models.lora import merge_lora, split_lora
from ppo_jax.models.partition import Parts, stack_layers, unstack_layers
from ppo_jax.models.rope import SCALINGS

DESCRIPTION = {  # what stage.json holds
    **{"stage": "a text", "kind": "a text", "model": "an object", "frozen": "true or false"},
    **{"settings": "an object", "num_steps": "a whole number", "trained_field": "a text"},
    **{"data": "an object", "sources": "an object of numbers"},
    "critic": "an object",  # of PPO, see `critics.keep_critic`
}
LATER = {"trained_field", "data", "sources", "critic"}  # those that other stages lack

# Of a metric; a user's reward may have any name.
LOWER_IS_BETTER = re.compile(r"^(?!reward/(?!kl_)).*(?<![a-z])(loss|perplexity|error|kl)(?![a-z])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with all of its parameters."""

    kind: str  # "policy" or "reward"
    config: ModelConfig
    params: Params  # numpy on the host, or arrays on the mesh of a layout
    tokenizer: Any
    layout: Layout | None = None  # of the parameters; None is the host
    step: int | None = None  # of the stage that it is from, where one was asked for
    padding_id: int | None = None  # of a reward model, see `huggingface.padding_id`
    others: tuple["Model", ...] = ()  # of a reward model: those that score with it


def load_model(
    path: str | os.PathLike,
    settings: ModelSettings | None = None,
    layout: Layout | None = None,
    step: int | None = None,
) -> Model:
    """A model from a stage folder, or from anything that `hf.load_policy` or
    `hf.load_reward_model` reads.

    Args:
        path: the folder, file or name.
        settings: how to compute with it, see `models.config.computation`; None is float32, or as
            the stage did.
        layout: how its parameters are sharded, straight from the files; None is the host.
        step: of a stage's checkpoint, as "@40" behind its folder is; None is the newest.

    Raises:
        ValueError: there is no complete model at `path`, or the layout cannot shard it.
    """
    path, asked = split_step(str(path))
    if asked is not None:
        check_step(Path(path), asked)
    step = asked if step is None else step
    if (Path(path) / "stage.json").is_file():
        model = load_stage(Path(path), layout, step)
        return model if settings is None else compute_as(model, settings)
    if stages := [x for x in STAGE_NAMES if (Path(path) / x / "stage.json").is_file()]:
        raise ValueError(f"{path} is a run: its stages {stages} are models, {path}/{stages[-1]}")
    how = {} if settings is None else computation(settings)
    _, raw = hf.read_model_config(model_folder(path), how)
    kind, padding_id = hf.model_kind(raw), hf.padding_id(raw)
    load = hf.load_policy if kind == "policy" else hf.load_reward_model
    config, params = load(path, shardings=shardings_of(layout), **how)
    tokenizer = vocabulary.load_tokenizer(path)
    check_tokenizer(tokenizer, config, path)
    if settings is not None:
        tokenizer = vocabulary.with_chat(tokenizer, settings)
    return Model(
        kind=kind,
        config=config,
        params=params,
        tokenizer=tokenizer,
        layout=layout,
        padding_id=padding_id,
    )


def shardings_of(layout: Layout | None) -> Shardings | None:
    """From shapes to shardings; None, for the host, where there is no layout."""
    if layout is None:
        return None
    return layout.shardings


def device_put(params: Params, layout: Layout | None) -> Params:
    """Parameters that were merged or stacked: numpy on the host, or sharded as the layout says."""
    if layout is None:
        return jax.tree.map(np.asarray, params)
    return layout.shard_params(params)


def compute_as(model: Model, settings: ModelSettings) -> Model:
    """The same model, computed as the settings ask for, with their chat template; its parameters
    are not moved."""
    params, config = model.params, dataclasses.replace(model.config, **computation(settings))
    if model.config.scan_layers != settings.scan_layers:
        change = stack_layers if settings.scan_layers else unstack_layers
        params = device_put(change(params), model.layout)
    tokenizer = vocabulary.with_chat(model.tokenizer, settings)
    return dataclasses.replace(model, config=config, params=params, tokenizer=tokenizer)


def check_tokenizer(tokenizer: Any, config: ModelConfig, path: Any):
    """Every token has a row of the model's token table; ids may have holes.

    Raises:
        ValueError: an id is beyond the table, where the last row would be read.
    """
    rows = vocabulary.table_size(tokenizer)
    if rows > config.vocab_size:
        last = tokenizer.convert_ids_to_tokens(rows - 1)
        raise ValueError(
            f"{path}: the tokenizer has ids up to {rows - 1} ({last!r}), for {rows} tokens, the "
            f"model {config.vocab_size}"
        )


def split_step(name: str) -> tuple[str, int | None]:
    """(name, None), or for STAGE@STEP (the stage's name or folder, a step of its checkpoints); of a
    folder, FOLDER@best is the step of `best_step`.

    >>> split_step("sft@200"), split_step("sft"), split_step("someone/model@2")
    (('sft', 200), ('sft', None), ('someone/model@2', None))
    """
    if match := re.fullmatch(r"(.+)@(\d+)", name):
        if match[1] in STAGE_NAMES or (Path(match[1]) / "stage.json").is_file():
            return match[1], int(match[2])
    folder = name.removesuffix("@best")
    if folder != name and (Path(folder) / "stage.json").is_file():
        return folder, best_step(Path(folder))
    return name, None


def with_step(stage: str, workdir: str | Path) -> str:
    """The name of a stage of a run with its step for "@best"; any other is as it was given."""
    name = stage.removesuffix("@best")
    return stage if name == stage else f"{name}@{best_step(stage_folder(workdir, name))}"


def best_step(folder: Path) -> int:
    """The step of the checkpoint that a stage keeps as its best.

    Raises:
        ValueError: its `keep` is by no metric, or it has no checkpoint, or no value of the metric.
    """
    keep = describe_stage(folder)["settings"].get("keep")
    if not isinstance(keep, str):
        raise ValueError(f"{folder} has no best checkpoint: its keep is {keep}, not 'best:METRIC'")
    metric, steps = keep.removeprefix("best:"), Checkpoints(folder / "checkpoints").steps()
    rows, _ = read_rows(folder.parent / "metrics.jsonl")
    rows = [row for row in rows if row["stage"] == folder.name and metric in row]
    if not steps or not rows:
        what = f"value of {metric} in {folder.parent}/metrics.jsonl" if steps else "checkpoint yet"
        raise ValueError(f"{folder} has no {what}")
    return best_of(rows, metric, steps)


def best_of(rows: Sequence[Mapping[str, Any]], metric: str, steps: Sequence[int]) -> int:
    """Which of some saved steps is best by the newest value of a metric up to it; of equal ones,
    and where there is no value yet, the newest.

    Args:
        rows: lines of metrics.jsonl of one stage, oldest first.
        metric: lower is better where `LOWER_IS_BETTER` says so.
        steps: one or more.
    """
    values = [(row["step"], x) for row in rows if (x := row.get(metric)) is not None]
    sign = -1.0 if LOWER_IS_BETTER.search(metric) else 1.0

    def rank(step: int) -> tuple[float, int]:
        before = [x for at, x in values if at <= step]
        return (sign * before[-1] if before else -math.inf, step)

    return max(steps, key=rank)


def check_step(folder: Path, step: int):
    """A stage has a checkpoint of this step.

    Raises:
        ValueError: it has not; with those that it has.
    """
    if step not in (steps := Checkpoints(folder / "checkpoints").steps()):
        raise ValueError(f"{folder} has no checkpoint of step {step}, but of {steps}; see keep")


def resolve(name: str, workdir: Path, base: str) -> str:
    """The path that `init_from` or `reward_model` stands for, without a step.

    "base" is the base model, the name of a stage is that stage of this workdir, anything else is
    a path of its own.
    """
    name, _ = split_step(name)
    if name == "base":
        return base
    return str(workdir / name) if name in STAGE_NAMES else name


def describe_stage(folder: Path) -> dict | None:
    """What `stage.json` says, or None where there is none.

    Raises:
        ValueError: it is not as a stage writes it.
    """
    path = folder / "stage.json"
    description = read_object(path, DESCRIPTION)
    if description is None:
        return None
    if missing := sorted(DESCRIPTION.keys() - LATER - description.keys()):
        raise ValueError(f"{path} must be as a stage writes it, but lacks {missing}")
    try:
        model_config(description["model"])
        if (critic := description.get("critic")) is not None:
            model_config(critic.get("model"), "critic.model.")
        if description["kind"] not in ("policy", "reward"):
            raise ValueError(f"kind must be 'policy' or 'reward', got {description['kind']!r}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return description


def begin_stage(folder: Path, model: Model, parts: Parts, description: dict):
    """Write what does not change while a stage trains; `stage.json` comes last, when all is there.

    Args:
        folder: the stage's folder.
        model: what the stage starts from; its kind is the kind of the result.
        parts: its parameters, split.
        description: the stage's name and settings, kept in stage.json.
    """
    with naming_file(folder / "tokenizer"):
        on_primary(vocabulary.save_tokenizer, model.tokenizer, folder / "tokenizer")
    frozen = merge_params(parts.trunk, parts.frozen)
    if frozen:
        save_params(folder / "frozen", frozen)
    spec = {"kind": model.kind, "model": config_values(model.config)}
    on_primary(write_description, folder, description | spec | {"frozen": bool(frozen)})


def update_stage(folder: Path, description: dict):
    """Settings that may change, and the number of steps, as the resumed run has them."""
    on_primary(write_description, folder, describe_stage(folder) | description)


def write_description(folder: Path, description: dict):
    atomic_write(folder / "stage.json", json.dumps(description, indent=2) + "\n")


def has_begun(folder: Path) -> bool:
    """Whether a stage has a checkpoint: before its first one it starts over, whatever differs."""
    return describe_stage(folder) is not None and bool(Checkpoints(folder / "checkpoints").steps())


def missing_steps(folder: Path) -> str | None:
    """What a stage lacks to be complete, or None when its last step can be read."""
    description = describe_stage(folder)
    if description is None:
        return "it has not begun"
    step, last = Checkpoints(folder / "checkpoints").readable_step(), description["num_steps"]
    return None if (step or 0) >= last else f"it has {step or 0} of {last} steps"


def source_steps(folder: Path) -> dict[str, int]:
    """{field: step} of the stages that a stage began from; {} if it has not begun."""
    return describe_stage(folder).get("sources", {}) if has_begun(folder) else {}


def other_field(number: int) -> str:
    """What the step of one of `other_reward_models` is called among those of `source_steps`."""
    return f"other_reward_models.{number}"


def check_pin(folder: Path, step: int):
    """A stage still has the step that another began from, however far it has gone on since.

    Raises:
        ValueError: the step is gone.
    """
    if step not in (steps := Checkpoints(folder / "checkpoints").steps()):
        raise ValueError(
            f"{folder} had taken {step} steps when this run began from it, but holds checkpoints "
            f"of steps {steps} alone now: put that of step {step} back, or choose another workdir"
        )


def load_source(
    name: str,
    workdir: Path,
    base: str,
    settings: ModelSettings,
    layout: Layout | None = None,
    step: int | None = None,
) -> Model:
    """The model that a stage starts from; a stage must be complete.

    Args:
        name: `init_from` or `reward_model`.
        workdir: the run's folder.
        base: path of the base model.
        settings: how to compute with it.
        layout: as in `load_model`.
        step: from which the run began before, see `source_steps`; None is the newest.

    Raises:
        ValueError: the stage is not complete: half of a training is seldom meant, unless `name`
            has a step of its own.
    """
    path, step = find_source(name, workdir, base, step)
    return load_model(path, settings, layout, step)


def find_source(
    name: str, workdir: Path, base: str, step: int | None = None
) -> tuple[str, int | None]:
    """(path, step) of what a stage starts from, arguments and errors as for `load_source`."""
    path, asked = resolve(name, workdir, base), split_step(name)[1]
    folder = Path(path)
    if step is not None:
        check_pin(folder, step)
    elif asked is not None:
        check_step(folder, step := asked)
    elif describe_stage(folder) is not None:
        if missing := missing_steps(folder):
            raise ValueError(
                f"the stage {path} is not complete: {missing}. Run it to its end first."
            )
        step = Checkpoints(folder / "checkpoints").readable_step()
    return path, step


def stage_folder(workdir: str | os.PathLike, stage: str) -> Path:
    """Where a run keeps one of its stages.

    Raises:
        ValueError: there is no such run, or it has no such stage.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"there is no run {workdir}")
    stages = [name for name in STAGE_NAMES if describe_stage(workdir / name) is not None]
    if stage not in stages:
        has = f"it has {', '.join(stages)}" if stages else "it has none"
        raise ValueError(f"{workdir} has no stage {stage}; {has}")
    return workdir / stage


def trained_config(description: dict) -> ModelConfig:
    """The config of a stage's model as it was trained, from its `stage.json`."""
    return model_config(description["model"])


def config_values(config: ModelConfig) -> dict[str, Any]:
    """What `stage.json` keeps of a model's config."""
    scaling = config.rope_scaling
    if scaling is not None:
        scaling = {"kind": scaling.kind, **dataclasses.asdict(scaling)}
    return dataclasses.asdict(config) | {"rope_scaling": scaling}


def model_config(values: Any, section: str = "model.") -> ModelConfig:
    """The inverse of `config_values`; `section` is what comes before a field in messages.

    Raises:
        ValueError: it is none; the message names the field.
    """
    try:
        return build_model(values, section)
    except ValueError as error:
        message = str(error)  # of a config's own checks, which know no other section
        named = message.startswith("model.")
        raise ValueError(section + message.removeprefix("model.") if named else message) from error


def build_model(values: Any, section: str) -> ModelConfig:
    if not isinstance(values, dict):
        return build(ModelConfig, values, section)  # which refuses it
    values, parts = dict(values), {}
    if isinstance(values.get("qk_norm"), bool):  # of before there was "whole"
        values["qk_norm"] = "head" if values["qk_norm"] else "none"
    if (scaling := values.pop("rope_scaling", None)) is not None:
        name = f"{section}rope_scaling"
        if not isinstance(scaling, dict):
            raise ValueError(f"{name} must be an object {{...}}, got {short_repr(scaling)}")
        scaling = {"kind": "llama3", **scaling}  # the only one there was
        if (kind := scaling.pop("kind")) not in list(SCALINGS):
            known = sorted(SCALINGS)
            raise ValueError(f"{name}.kind must be one of {known}, got {short_repr(kind)}")
        parts["rope_scaling"] = build(SCALINGS[kind], scaling, f"{name}.")
    if "layer_kinds" in values:
        name, kinds = f"{section}layer_kinds", values.pop("layer_kinds")
        if not isinstance(kinds, list):
            raise ValueError(f"{name} must be a list of objects, got {short_repr(kinds)}")
        parts["layer_kinds"] = tuple(
            build(LayerKind, kind, f"{name}[{i}].") for i, kind in enumerate(kinds)
        )
    if (experts := values.pop("experts", None)) is not None:
        parts["experts"] = build(Experts, experts, f"{section}experts.")
    return dataclasses.replace(build(ModelConfig, values, section), **parts)


def trained_field(description: dict) -> str:
    """The field of the saved state that has the model's trained parameters."""
    before_0_2 = "policy_params" if description["stage"] == "ppo" else "params"
    return description.get("trained_field", before_0_2)


def stage_config(description: dict) -> ModelConfig:
    """The same as it is loaded: adapters are in the weights then."""
    return dataclasses.replace(trained_config(description), lora_alpha=0.0)


def load_stage(folder: Path, layout: Layout | None = None, step: int | None = None) -> Model:
    """The model of a stage, at a step or at its newest complete checkpoint; see `load_model`.

    Adapters are merged into its weights."""
    description = describe_stage(folder)
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: run the stage first")
    shardings = shardings_of(layout)
    trained = load_checkpoint_item(checkpoints, trained_field(description), step, shardings)
    frozen = load_params(folder / "frozen", shardings) if description["frozen"] else {}
    params = merge_lora(trained_config(description), merge_params(frozen, trained))
    return Model(
        kind=description["kind"],
        config=stage_config(description),
        params=device_put(params, layout),
        tokenizer=vocabulary.load_tokenizer(folder / "tokenizer"),
        layout=layout,
        step=step,
    )


def load_adapters(folder: Path, step: int | None = None) -> tuple[ModelConfig, Params]:
    """What a stage trained beside the weights: (config of the model, the adapters alone), numpy.

    `step` is of its checkpoint; None is the newest.

    Raises:
        ValueError: the stage trained no adapters, or has no complete checkpoint.
    """
    description = describe_stage(folder)
    if (trainable := description["settings"].get("trainable")) != "lora":
        raise ValueError(f"{folder} has no adapter: its trainable is {trainable!r}, not 'lora'")
    trained = load_checkpoint_item(folder / "checkpoints", trained_field(description), step)
    return trained_config(description), split_lora(trained)[1]
