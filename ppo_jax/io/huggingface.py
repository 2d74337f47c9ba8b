"""Hugging Face weights: config.json and safetensors to `ModelConfig` and parameters, and back.

Every tensor in the files is used and every parameter is filled, or the load fails and names it.
Pickled weights and code from a checkpoint are never run.
"""

import contextlib
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
    matrix_shape,
    read_parameters,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import family_of, read_config

INDEX = "model.safetensors.index.json"


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
    folder = model_folder(path)
    how = dict(dtype=dtype, scan_layers=scan_layers, remat=remat, attention=attention)
    config, family = read_model_config(folder, how)
    with open_weights(folder) as files:
        with reading_file(folder):
            stored = find_parameters(config, family, files)
        try:
            return config, read_parameters(stored, shardings)
        except NotFinite as error:
            raise ValueError(f"{folder}: {error}") from error


def read_model_config(folder: Path, how: dict[str, Any]) -> tuple[ModelConfig, str]:
    """(the config of a folder's config.json, its family); for `how` see `config.computation`."""
    raw = read_config_json(folder)
    with reading_file(folder / "config.json"):
        return read_config(raw, **how), raw["model_type"]


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
    pickled = sorted(x.name for x in folder.iterdir() if x.suffix in (".bin", ".pt", ".pth"))
    only = f", only {pickled}, and pickled weights can run code" if pickled else ""
    raise ValueError(
        f"{folder} has no model.safetensors{only}. To convert a model that you trust, where torch "
        'is installed: python -c "from transformers import AutoModelForCausalLM as M; '
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
    for path, layer, leaf in leaves_by_layer(config, params):
        if path not in rows:
            raise ValueError(f"a {family} checkpoint has no place for the parameter {path}")
        row = rows[path]
        array = np.asarray(leaf)
        matrix = array.reshape(matrix_shape(path, array.shape))
        name = row.name.format(layer)
        if row.third is not None:
            thirds = tensors.setdefault(
                name, np.empty((*matrix.shape[:-1], 3 * matrix.shape[-1]), matrix.dtype)
            )
            np.split(thirds, 3, axis=-1)[row.third][...] = matrix
        else:
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
