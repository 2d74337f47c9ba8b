"""Hugging Face weights: config.json and safetensors to `ModelConfig` and parameters, and back.

Every tensor in the files is used and every parameter is filled, or the load fails and names it.
Pickled weights and code from a checkpoint are never run.

Dimension key: D model, H heads, G key/value heads, K head size, F feed-forward, V vocabulary.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from ppo_jax.families import DERIVED, NAMES, PREFIX, Tensor, read_config
from ppo_jax.networks import ModelConfig, Params, policy_network
from ppo_jax.sources import model_folder

DTYPES = ("float32", "float16", "bfloat16")
INDEX = "model.safetensors.index.json"


def load_config(
    path: str | os.PathLike, *, dtype: str = "float32", scan_layers: bool = False
) -> ModelConfig:
    """The shape of a pretrained model, without its weights.

    Args:
        path: as in `load_policy`.
        dtype: of the computation, "float32", "bfloat16" or "float16".
        scan_layers: one scanned body instead of unrolled layers.

    Raises:
        ValueError: the path leads nowhere, or to a family or an option that is not supported.
    """
    folder = model_folder(path)
    return read_config(read_json(folder), dtype=dtype, scan_layers=scan_layers)


def load_policy(
    path: str | os.PathLike, *, dtype: str = "float32", scan_layers: bool = False
) -> tuple[ModelConfig, Params]:
    """A pretrained model of the GPT-2, Llama, Qwen2 or Qwen3 family.

    Args:
        path: a folder with config.json and safetensors, a .gguf file, the id of a model on the
            Hugging Face hub, or "package:smollm2-135m-instruct".
        dtype: of the computation. Parameters are float32 whatever the files hold.
        scan_layers: layers stacked along a leading axis instead of one subtree each.

    Returns:
        (config, params). The parameters are numpy arrays in the memory of the host, at most one
        tensor above their own size while loading; where they go from there is for the caller.

    Raises:
        ValueError: the model is not supported, or its files and its config.json do not agree.
    """
    folder = model_folder(path)
    raw = read_json(folder)
    config = read_config(raw, dtype=dtype, scan_layers=scan_layers)
    with contextlib.ExitStack() as stack:
        files = {
            key: file
            for name in weight_files(folder)
            for file in [stack.enter_context(safe_open(folder / name, framework="numpy"))]
            for key in file.keys()  # noqa: SIM118, a safetensors file is not a mapping
        }
        tensors = canonical_names(files, raw["model_type"])
        return config, read_params(config, raw["model_type"], tensors)


def read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder, one or several."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: {INDEX} names {missing}, which are not there")
        return names
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    only = f", only {found}, and pickled weights can run code" if found else ""
    raise ValueError(
        f"{folder} has no model.safetensors{only}. To convert a model that you trust, where torch "
        'is installed: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def canonical_names(files: dict[str, Any], family: str) -> dict[str, tuple[Any, str]]:
    """Full name of each tensor -> (open file, its name there), without derived constants."""
    tensors: dict[str, tuple[Any, str]] = {}
    for key, file in files.items():
        is_full = key.startswith((PREFIX[family], "lm_head."))
        name = key if is_full else PREFIX[family] + key
        if DERIVED.fullmatch(name.removeprefix(PREFIX[family])):
            continue
        if name in tensors:
            raise ValueError(f"the weight files hold {name} twice: {key}, {tensors[name][1]}")
        tensors[name] = (file, key)
    return tensors


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all parameters of a policy; those of layers with a leading layer axis."""
    stacked = replace(config, scan_layers=True)  # one layer to trace, however many there are
    tree = jax.eval_shape(policy_network(stacked).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [(".".join(entry.key for entry in path), leaf.shape) for path, leaf in leaves]
    return {path.replace("layers.stack.", "layers."): shape for path, shape in paths}


def read_params(config: ModelConfig, family: str, tensors: dict[str, tuple[Any, str]]) -> Params:
    """Fill the parameter tree from open files; see `load_policy`."""
    shapes = parameter_shapes(config)
    rows = {path: NAMES[family][path] for path in shapes}
    check_names(config, rows, tensors)
    flat = {}
    for path, shape in shapes.items():
        flat[path] = np.empty(shape, np.float32)
        for name, target in targets(path, rows[path], flat[path]):
            target[...] = from_file(read_tensor(*tensors[name]), name, path, rows[path], target)
    if config.tie_embeddings and "lm_head.weight" in tensors:
        if not np.array_equal(read_tensor(*tensors["lm_head.weight"]), flat["embed.tokens"]):
            raise ValueError(
                "config.json ties the head to the embedding, but lm_head.weight differs from "
                f"{rows['embed.tokens'].name}; should tie_word_embeddings be false?"
            )
    return nest(flat, scan_layers=config.scan_layers)


def targets(path: str, row: Tensor, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, the part of `array` that it fills), layer by layer."""
    if not path.startswith("layers."):
        yield row.name, array
        return
    for i in range(len(array)):
        yield row.name.format(i), array[i]


def check_names(config: ModelConfig, rows: dict[str, Tensor], tensors: dict[str, Any]) -> None:
    """Refuse, before anything is read, files that lack a tensor or have one too many."""
    needed = {
        row.name.format(i)
        for path, row in rows.items()
        for i in range(config.num_layers if path.startswith("layers.") else 1)
    }
    allowed = needed | ({"lm_head.weight"} if config.tie_embeddings else set())
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"the weight files lack {len(missing)} tensors: {shorten(missing)}")
    if unused := sorted(tensors.keys() - allowed):
        raise ValueError(
            f"the weight files hold {len(unused)} tensors that the model of config.json does not "
            f"have: {shorten(unused)}"
        )


def shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def read_tensor(file: Any, key: str) -> np.ndarray:
    tensor = file.get_tensor(key)
    if tensor.dtype.name not in DTYPES:
        raise ValueError(f"{key} is stored as {tensor.dtype}; choose from {list(DTYPES)}")
    return tensor


def from_file(
    tensor: np.ndarray, name: str, path: str, row: Tensor, target: np.ndarray
) -> np.ndarray:
    """A stored tensor in the layout of the parameter that it fills."""
    expected = as_matrix(path, target).shape
    if row.third is not None:
        expected = (*expected[:-1], 3 * expected[-1])
    if row.transposed:
        expected = expected[::-1]
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tensor.shape}, but config.json asks for {expected}")
    if row.third is not None:
        tensor = np.split(tensor, 3, axis=-1)[row.third]
    return (tensor.T if row.transposed else tensor).reshape(target.shape)


def as_matrix(path: str, array: np.ndarray) -> np.ndarray:
    """One parameter of one layer with its heads flattened: [in, out] for a kernel, else [size].

    Kernels are [D, H, K] before the heads and [H, K, D] after them; biases [H, K].
    """
    if path.endswith("output.kernel"):
        return array.reshape(-1, array.shape[-1])
    if path.endswith("bias"):
        return array.reshape(-1)
    return array.reshape(array.shape[0], math.prod(array.shape[1:])) if array.ndim > 1 else array


def nest(flat: dict[str, np.ndarray], *, scan_layers: bool) -> Params:
    """Paths to a tree; layers as one stack, or as a subtree of views for each."""
    tree: Params = {}
    for path, array in flat.items():
        if not path.startswith("layers."):
            put(tree, path, array)
        elif scan_layers:
            put(tree, path.replace("layers.", "layers.stack.", 1), array)
        else:
            for i, layer in enumerate(array):
                put(tree, path.replace("layers.", f"layers.{i}.", 1), layer)
    return tree


def put(tree: Params, path: str, value: np.ndarray) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def params_to_hf(config: ModelConfig, family: str, params: Params) -> dict[str, np.ndarray]:
    """Parameters of a policy under the names and in the layout of a Hugging Face checkpoint.

    Args:
        config: the model's shape.
        family: "gpt2", "llama", "qwen2" or "qwen3".
        params: of `policy_network(config)`, any float dtype.

    Returns:
        Name -> array of the dtype of its parameter; the inverse of `load_policy`. A tied head is
        left out, as transformers does.

    Raises:
        ValueError: the family is unknown or has no place for one of the parameters.
    """
    if family not in NAMES:
        raise ValueError(f"model family {family!r} is not supported; choose from {sorted(NAMES)}")
    tensors: dict[str, np.ndarray] = {}
    for path, layer, leaf in leaves_by_layer(config, params):
        if path not in NAMES[family]:
            raise ValueError(f"a {family} checkpoint has no place for the parameter {path}")
        row = NAMES[family][path]
        matrix = as_matrix(path, np.asarray(leaf))
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
