"""No more of a weight file is read than a piece has, and no more of a model held than has to be."""

import math
import mmap
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.io import huggingface as hf
from ppo_jax.io import safetensors as hf_tensors
from ppo_jax.io.model_spec import check_weights
from ppo_jax.models.config import ModelConfig
from tests.support.meshes import MESHES, layout_of
from tests.support.tiny_hf import assert_same_tree
from tests.support.weight_files import MODELS, count_reads, saver, write_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


def bytes_by_tensor(reads):
    total = {}
    for name, size in reads:
        total[name] = total.get(name, 0) + size
    return total


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama-biases"])
def test_every_number_of_the_files_is_read_once(saved, monkeypatch, name, mesh):
    folder, _, tensors = saved(name)
    for scan_layers in (False, True):
        reads = count_reads(monkeypatch)
        hf.load_policy(folder, scan_layers=scan_layers, shardings=layout_of(mesh).shardings)
        assert bytes_by_tensor(reads) == {name: x.nbytes for name, x in tensors.items()}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama-biases", "qwen3"])
def test_a_piece_reads_its_own_numbers_alone(saved, monkeypatch, name, scan_layers):
    """So the process of one device reads what that device holds."""
    folder, *_ = saved(name)
    reads = count_reads(monkeypatch)
    config = hf.load_config(folder, scan_layers=scan_layers)
    layout, size = layout_of((2, 2, 2)), MODELS[name][1]().nbytes
    with hf.open_weights(folder) as files:
        stored = hf_tensors.find_parameters(config, name.split("-")[0], files)
        _, host = hf.load_policy(folder, scan_layers=scan_layers)
        leaves = [jax.tree.leaves(x) for x in (stored, host, layout.shardings(host))]
        for parameter, whole, sharding in zip(*leaves, strict=True):
            for index in sharding.addressable_devices_indices_map(whole.shape).values():
                reads.clear()
                part = parameter.read(index)
                np.testing.assert_array_equal(part, whole[index])
                assert sum(n for _, n in reads) == part.size * size


def test_a_tied_head_is_compared_in_slices(saved, tmp_path, monkeypatch):
    folder, written, tensors = saved("llama-tied")
    monkeypatch.setattr(hf_tensors, "COMPARED_ROWS", 5)
    name, shardings = "model.embed_tokens.weight", layout_of((1, 8, 1)).shardings
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors[name].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    reads = count_reads(monkeypatch)
    _, params = hf.load_policy(tmp_path, shardings=shardings)
    assert_same_tree(jax.tree.map(np.asarray, params), written)
    head = [size for tensor, size in reads if tensor == "lm_head.weight"]
    assert len(head) == math.ceil(48 / 5) and sum(head) == tensors[name].nbytes
    for wrong in (tensors[name] + np.eye(48, 16, -47, dtype=np.float32), tensors[name][:-1]):
        save_file(tensors | {"lm_head.weight": wrong}, tmp_path / "model.safetensors")
        for where in (shardings, None):
            with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens"):
                hf.load_policy(tmp_path, shardings=where)


def test_shapes_are_checked_before_anything_is_read(saved, tmp_path, monkeypatch):
    folder, *_ = saved("llama-tied")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    # The last of the parameters by any order.
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    reads = count_reads(monkeypatch)
    for load in (
        lambda: hf.load_policy(tmp_path),
        lambda: hf.load_policy(tmp_path, shardings=layout_of((1, 8, 1)).shardings),
        lambda: check_weights(tmp_path, hf.load_config(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"norm\.weight has shape \(17,\).*asks for \(16,\)"):
            load()
    assert not reads


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """75 MB of bfloat16, most of it feed-forward layers; 150 MB once it is float32."""
    folder = tmp_path_factory.mktemp("large")
    sizes = dict(vocab_size=512, embed_dim=1024, mlp_dim=2048, head_dim=8)
    config = ModelConfig(
        num_layers=6, max_length=32, num_heads=8, num_kv_heads=8, tie_embeddings=False, **sizes
    )
    write_model(folder, config, ml_dtypes.bfloat16, 4)
    return folder


TENSOR = 1024 * 2048 * 2  # bytes of the largest
SLACK = 5e5  # bytes: what Python keeps for a tree of arrays
DEVICE_PUT = jax.device_put


def put_aside(x, device):
    """As on an accelerator: the device has memory of its own, of which the host's is not a part.

    A CPU device may keep the array that it is given, and JAX lets go of it in its own time.
    """
    own = np.frombuffer(mmap.mmap(-1, x.nbytes), x.dtype).reshape(x.shape)
    own[...] = x
    return DEVICE_PUT(own, device)


def traced_read(folder, shardings, *, scan_layers):
    """(bytes that Python and numpy held at once while parameters were read, the parameters).

    The least of some reads: what is made once, or by another thread meanwhile, is not counted.
    """
    config = hf.load_config(folder, scan_layers=scan_layers)
    peaks = []
    with hf.open_weights(folder) as files:
        stored = hf_tensors.find_parameters(config, "llama", files)
        for _ in range(4):
            params = None  # let go of before the next read
            tracemalloc.start()
            try:
                params = hf_tensors.read_parameters(stored, shardings)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    return min(peaks), params


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_host_holds_one_piece_and_a_part_of_one_tensor(large, monkeypatch, scan_layers):
    monkeypatch.setattr(jax, "device_put", put_aside)
    peak, params = traced_read(large, layout_of((1, 8, 1)).shardings, scan_layers=scan_layers)
    piece = max(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert piece == 2 * TENSOR / 8 * (6 if scan_layers else 1)
    assert piece < peak < piece + TENSOR / 8 + SLACK


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_host_way_holds_one_tensor_above_the_model(large, scan_layers):
    peak, params = traced_read(large, None, scan_layers=scan_layers)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert 150e6 < size < peak < size + TENSOR + SLACK
