"""Hugging Face weights: config.json and safetensors to `ModelConfig` and parameters, and back.

Every tensor in the files is used and every parameter is filled, or the load fails and names it.
Pickled weights and code from a checkpoint are never run.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from ppo_jax.core.types import Params
from ppo_jax.data.readers import short_repr
from ppo_jax.io.hub import model_folder
from ppo_jax.io.integrity import file_inside, read_json, reading_file
from ppo_jax.io.safetensors import (
    Files,
    NotFinite,
    find_parameters,
    join_fused,
    matrix_shape,
    read_parameters,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import family_of, read_config

INDEX = "model.safetensors.index.json"
SCORE_WEIGHT = "score.weight"  # the head of a sequence classification, [labels, D]
CLASSIFIES = "ForSequenceClassification"  # in the architectures of a reward model


def load_config(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike = "float32",
    scan_layers: bool = False,
    remat: str = "none",
    attention: str = "auto",
) -> ModelConfig:
    """The config of a pretrained model, without its weights; arguments as in `load_policy`.

    Raises:
        ValueError: the path leads nowhere, or to a family or an option that is not supported.
    """
    how = dict(dtype=dtype, scan_layers=scan_layers, remat=remat, attention=attention)
    return read_model_config(model_folder(path), how)[0]


def load_policy(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike = "float32",
    scan_layers: bool = False,
    remat: str = "none",
    attention: str = "auto",
    shardings: Callable[[Params], Any] | None = None,
) -> tuple[ModelConfig, Params]:
    """A pretrained model of one of the families of `ppo_jax.models.families`.

    Args:
        path: a folder with config.json and safetensors, a .gguf file, the id of a model on the
            Hugging Face hub, or "package:smollm2-135m-instruct".
        dtype: of the computation, "float32", "bfloat16" or "float16", or such a dtype of JAX, as
            `jnp.bfloat16`. Parameters are float32 whatever the files hold.
        scan_layers: layers stacked along a leading axis instead of one subtree each.
        remat: what the backward pass computes again, "none", "dots" or "full".
        attention: "auto" by the platform, or "plain".
        shardings: from the tree of parameters, as `jax.ShapeDtypeStruct`s, to the tree of their
            shardings: `Layout.shardings`. None loads to the host.

    Returns:
        (config, params). Without `shardings` numpy arrays on the host; loading takes at most one
        tensor more than their own size. With them arrays on the mesh: a process reads only what its
        own devices hold, one shard of one parameter after another.

    Raises:
        OSError: a file may not be read, or too many files are open.
        ValueError: the model is not supported, or its files and its config.json do not agree, or
            a parameter is not finite, or what `shardings` raises.
    """
    how = dict(dtype=dtype, scan_layers=scan_layers, remat=remat, attention=attention)
    return load_weights(model_folder(path), "policy", shardings, how)


def load_reward_model(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike = "float32",
    scan_layers: bool = False,
    remat: str = "none",
    attention: str = "auto",
    shardings: Callable[[Params], Any] | None = None,
) -> tuple[ModelConfig, Params]:
    """A reward model: a sequence classification with one label of the families of `load_policy`.

    score = w h + score_bias, with h the state after the final norm at the last token of the text
    that is not `padding_id`, w the tensor score.weight. Neither transformers nor its files have a
    constant; `score_bias` in config.json is that of our exports, 0 where there is none.
    Its problem type shapes a loss there and no score.

    Args and what it returns are as of `load_policy`; `models.build.reward_network` computes it.

    Raises:
        ValueError: as `load_policy`; or the model has no label or several.
    """
    how = dict(dtype=dtype, scan_layers=scan_layers, remat=remat, attention=attention)
    return load_weights(model_folder(path), "reward", shardings, how)


def load_weights(
    folder: Path, kind: str, shardings: Callable[[Params], Any] | None, how: dict[str, Any]
) -> tuple[ModelConfig, Params]:
    """The model of a folder, of the kind that is expected: "policy" or "reward"."""
    config, raw = read_model_config(folder, how)
    if (found := model_kind(raw)) != kind:
        raise ValueError(
            f"{folder} must be a {kind} model, but its architectures are "
            f"{raw.get('architectures')}: that is a {found} model"
        )
    with open_weights(folder) as files:
        with reading_file(folder):
            stored = find_weights(config, raw, files)
        try:
            return config, read_parameters(stored, shardings)
        except NotFinite as error:
            raise ValueError(f"{folder}: {error}") from error


def load_classifier(
    path: str | os.PathLike, label: str
) -> tuple[ModelConfig, list[Params], int, int | None]:
    """A sequence classification with several labels, as a reward model a label.

    Args:
        path: as of `load_policy`.
        label: the name of one of them, as id2label of config.json has it, or LABEL_0, ...

    Returns:
        (config, the parameters for each label, which share all but the head, the label's number,
        the padding token, see `padding_id`).

    Raises:
        ValueError: the model is not supported, or has no such label.
    """
    folder = model_folder(path)
    config, raw, number, padding = read_classifier(folder, label)
    with open_weights(folder) as files, reading_file(folder):
        head = files[SCORE_WEIGHT]
        stored = find_weights(config, raw, files | {SCORE_WEIGHT: FirstRow(head)})
        params = read_parameters(stored, None)
        heads = np.asarray(head.get_tensor(SCORE_WEIGHT), np.float32)  # [labels, D]
    each = [{**params, "head": {**params["head"], "kernel": row[:, None]}} for row in heads]
    return config, each, number, padding


def read_classifier(
    folder: Path, label: str
) -> tuple[ModelConfig, dict[str, Any], int, int | None]:
    """(config, config.json as of one label, the label's number, the padding token), no weights."""
    raw = read_config_json(folder)
    if CLASSIFIES not in str(raw.get("architectures")):
        raise ValueError(f"{folder} is no sequence classification: it has no label {label!r}")
    with open_weights(folder) as files:
        if SCORE_WEIGHT not in files:
            raise ValueError(f"{folder} has no tensor {SCORE_WEIGHT}")
        count = files[SCORE_WEIGHT].get_slice(SCORE_WEIGHT).get_shape()[0]
    names = raw.get("id2label") or {}
    labels = [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]
    if label not in labels or count < 2:
        raise ValueError(f"{folder} must have several labels, {label!r} among them, got {labels}")
    one = {k: v for k, v in raw.items() if k not in ("id2label", "label2id", "num_labels")}
    with reading_file(folder / "config.json"):
        return read_config(one), one, labels.index(label), padding_id(one)


class FirstRow:
    """A file of weights whose head has the first of its rows alone."""

    def __init__(self, file: Any):
        self.file = file

    def get_slice(self, name: str) -> "FirstRow":
        """The head: the only tensor that is asked of it."""
        self.tensor = self.file.get_slice(name)
        return self

    def get_dtype(self) -> str:
        return self.tensor.get_dtype()

    def get_shape(self) -> list[int]:
        return [1, *self.tensor.get_shape()[1:]]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.tensor[:1][index]


def find_weights(config: ModelConfig, raw: dict[str, Any], files: Files) -> Params:
    """`find_parameters` of the model that a config.json is of."""
    bias = score_bias(raw) if model_kind(raw) == "reward" else None
    return find_parameters(config, raw["model_type"], files, bias)


def model_kind(raw: dict[str, Any]) -> str:
    """What a config.json is of: "reward", a sequence classification with one label, or "policy".

    Raises:
        ValueError: it has several labels, or none.
    """
    if CLASSIFIES not in str(raw.get("architectures")):
        return "policy"
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, dict) else raw.get("num_labels")
    if count not in (None, 1):  # None: the shape of the head tells
        raise ValueError(f"num_labels must be 1 for a reward model, a score a text, got {count!r}")
    return "reward"


def score_bias(raw: dict[str, Any]) -> float:
    """What the scores of the files lack, see `load_reward_model`."""
    bias = raw.get("score_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise ValueError(f"score_bias must be a number, got {bias!r}")
    return float(bias)


def padding_id(raw: dict[str, Any]) -> int | None:
    """The token that a reward model's texts are padded with: its score is read at the last token
    that is another, so that it is read before EOS where EOS is the padding. None of a policy."""
    token = raw.get("pad_token_id") if model_kind(raw) == "reward" else None
    if token is not None and type(token) is not int:
        raise ValueError(f"pad_token_id must be a token's id, got {token!r}")
    return token


def read_model_config(folder: Path, how: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """(the config of a folder, its config.json, checked); for `how` see `config.computation`."""
    raw = read_config_json(folder)
    with reading_file(folder / "config.json"):
        if model_kind(raw) == "reward":
            score_bias(raw), padding_id(raw)
        return read_config(raw, **how), raw


def read_config_json(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a folder: path -> the tensors that its index expects there.

    The latter is None where there is no index.
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX)
    reward = model_kind(read_config_json(folder)) == "reward"
    task = CLASSIFIES if reward else "ForCausalLM"
    pickled = sorted(x.name for x in folder.iterdir() if x.suffix in (".bin", ".pt", ".pth"))
    only = f", only {pickled}, and pickled weights can run code" if pickled else ""
    raise ValueError(
        f"{folder} has no model.safetensors{only}. To convert a model that you trust, where torch "
        f'is installed: python -c "from transformers import AutoModel{task} as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def read_index(path: Path) -> dict[str, list[str] | None]:
    """The shards that an index names, in order: name -> tensors that it expects there."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(
            f"{path}: weight_map must be an object {{tensor: file}}, got {short_repr(where)}"
        )
    tensors: dict[str, list[str] | None] = {}
    for tensor, name in sorted(where.items(), key=lambda item: str(item[1])):
        if not isinstance(name, str) or name not in tensors:
            file_inside(path.parent, name, f"{path}: weight_map[{short_repr(tensor)}]")
        tensors.setdefault(name, []).append(tensor)
    return tensors


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Files]:
    """The weight files of a folder, open; their headers alone have been read.

    A tensor that stands in two shards is that of the one which the index names.

    Raises:
        OSError: one may not be read, or too many files are open.
        ValueError: there are none, one is damaged, or lacks what the index says that it holds.
    """
    with contextlib.ExitStack() as stack:
        files: Files = {}
        indexed: Files = {}
        for name, expected in weight_files(folder).items():
            file = stack.enter_context(open_safetensors(folder / name))
            held = set(file.keys())
            for tensor in expected or ():
                if tensor not in held:
                    raise ValueError(
                        f"{folder / name} has no tensor {tensor}, which {INDEX} says is there"
                    )
            files |= dict.fromkeys(held, file)
            indexed |= dict.fromkeys(expected or (), file)
        yield files | indexed


def open_safetensors(path: Path) -> Any:
    """One file, open; its header has been compared with its size.

    Raises:
        OSError: it may not be read, or too many files are open.
        ValueError: it is damaged.
    """
    path.open("rb").close()  # safetensors calls it missing whatever the reason is
    with reading_file(path):
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def params_to_hf(config: ModelConfig, family: str, params: Params) -> dict[str, np.ndarray]:
    """Parameters of a policy under the names and in the layout of a Hugging Face checkpoint.

    Each array has the dtype of its parameter. This is the inverse of `load_policy`; a tied head is
    omitted, as transformers does. The family is one of `models.families.FAMILIES`, such as "llama".

    Raises:
        ValueError: the family is unknown or has no place for one of the parameters.
    """
    rows = family_of(family).tensors
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, dict[str, np.ndarray]] = {}
    for path, layer, leaf in leaves_by_layer(config, params):
        if path not in rows:
            raise ValueError(f"a {family} checkpoint has no place for the parameter {path}")
        row, array = rows[path], np.asarray(leaf)
        if row.per_expert:
            for expert, own in enumerate(array):
                matrix = own.T if row.transposed else own
                tensors[row.name.format(layer, expert)] = np.ascontiguousarray(matrix)
            continue
        matrix, name = array.reshape(matrix_shape(path, array.shape)), row.name.format(layer)
        if row.fusion is not None:
            parts = fused.setdefault(name, {})
            parts[path] = matrix
            if len(parts) < len(row.fusion.paths):
                continue
            ordered = [fused[name].pop(other) for other in row.fusion.paths]
            matrix = join_fused(row.fusion, ordered, config.head_dim)
        tensors[name] = np.ascontiguousarray(matrix.T if row.transposed else matrix)
    return tensors


def leaves_by_layer(config: ModelConfig, params: Params) -> Iterator[tuple[str, int, Any]]:
    """(path without the layer, layer, array) of every parameter; layer 0 outside of layers."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in keys]
        if names[0] != "layers":
            yield ".".join(names), 0, leaf
            continue
        path = ".".join(["layers", *names[2:]])
        if names[1] == "stack":
            for i in range(config.num_layers):
                yield path, i, leaf[i]
        else:
            yield path, int(names[1]), leaf
