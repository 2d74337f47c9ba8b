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
from safetensors import SafetensorError, safe_open

from ppo_jax.families import DERIVED, NAMES, PREFIX, Tensor, read_config
from ppo_jax.networks import ModelConfig, Params, policy_network
from ppo_jax.sources import model_folder

DTYPES = ("F32", "F16", "BF16")  # as safetensors calls them
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
    with open_weights(folder, config, raw["model_type"]) as tensors:
        return config, read_params(config, raw["model_type"], tensors)


@contextlib.contextmanager
def open_weights(
    folder: Path, config: ModelConfig, family: str
) -> Iterator[dict[str, tuple[Any, str]]]:
    """The tensors of a folder as `canonical_names` gives them, checked by the files' headers alone.

    Raises:
        ValueError: a file or a tensor is not as the config asks for; with the folder.
    """
    with contextlib.ExitStack() as stack:
        files = {
            key: file
            for name in weight_files(folder)
            for file in [stack.enter_context(open_file(folder / name))]
            for key in file.keys()  # noqa: SIM118, a safetensors file is not a mapping
        }
        try:
            tensors = canonical_names(files, family)
            check_tensors(config, family, tensors)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        yield tensors


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


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
    names = NAMES[family]
    flat = {}
    for path, shape in shapes.items():
        flat[path] = np.empty(shape, np.float32)
        for i, target in enumerate(flat[path] if path.startswith("layers.") else [flat[path]]):
            file, key = tensors[names[path].name.format(i)]
            target[...] = from_file(file.get_tensor(key), names[path], target.shape)
    if config.tie_embeddings and "lm_head.weight" in tensors:
        file, key = tensors["lm_head.weight"]
        if not np.array_equal(file.get_tensor(key), flat["embed.tokens"]):
            raise ValueError(
                "config.json ties the head to the embedding, but lm_head.weight differs from "
                f"{names['embed.tokens'].name}; should tie_word_embeddings be false?"
            )
    return nest(flat, scan_layers=config.scan_layers)


def check_tensors(config: ModelConfig, family: str, tensors: dict[str, tuple[Any, str]]) -> None:
    """Refuse, before anything is read, a tensor that is missing, too many, or not as it must be."""
    needed = {}
    for path, shape in parameter_shapes(config).items():
        row, layers = NAMES[family][path], 1
        if path.startswith("layers."):
            layers, shape = shape[0], shape[1:]
        needed |= {row.name.format(i): shape_in_file(path, row, shape) for i in range(layers)}
    allowed = needed.keys() | ({"lm_head.weight"} if config.tie_embeddings else set())
    if missing := sorted(needed.keys() - tensors.keys()):
        raise ValueError(f"the weight files lack {len(missing)} tensors: {shorten(missing)}")
    if unused := sorted(tensors.keys() - allowed):
        raise ValueError(
            f"the weight files hold {len(unused)} tensors that the model of config.json does not "
            f"have: {shorten(unused)}"
        )
    for name, (file, key) in tensors.items():
        header = file.get_slice(key)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{name} is stored as {dtype}; choose from {list(DTYPES)}")
        if shape != (expected := needed.get(name, shape)):
            raise ValueError(f"{name} has shape {shape}, but config.json asks for {expected}")


def shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def shape_in_file(path: str, row: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which one parameter of one layer is stored."""
    stored = matrix_shape(path, shape)
    if row.third is not None:
        stored = (*stored[:-1], 3 * stored[-1])
    return stored[::-1] if row.transposed else stored


def from_file(tensor: np.ndarray, row: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A stored tensor in the layout of the parameter that it fills."""
    if row.third is not None:
        tensor = np.split(tensor, 3, axis=-1)[row.third]
    return (tensor.T if row.transposed else tensor).reshape(shape)


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One parameter of one layer with its heads flattened: [in, out] for a kernel, else [size].

    Kernels are [D, H, K] before the heads and [H, K, D] after them; biases [H, K].
    """
    if path.endswith("output.kernel"):
        return (math.prod(shape[:-1]), shape[-1])
    if path.endswith("bias") or len(shape) == 1:
        return (math.prod(shape),)
    return (shape[0], math.prod(shape[1:]))


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
        matrix = np.reshape(leaf, matrix_shape(path, np.shape(leaf)))
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
