"""Models are read straight into the pieces of a mesh, and no more of a file than a piece has."""

import contextlib
import json
import math
import mmap
import tracemalloc
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from ppo_jax import hf, hf_tensors, vocabulary
from ppo_jax.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from ppo_jax.config import ModelSettings
from ppo_jax.families import write_config
from ppo_jax.models import Model, begin_stage, load_model, load_source
from ppo_jax.networks import ModelConfig, policy_network
from ppo_jax.partition import split_params
from ppo_jax.plan import check_weights
from ppo_jax.sharding import ROLLOUT_RULES, RULES, AxisRules, Layout, MeshSettings, make_mesh
from tests.tiny_hf import assert_same_tree

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
SIZES = dict(vocab_size=48, embed_dim=16, mlp_dim=24, num_heads=8, num_kv_heads=8, head_dim=6)
GPT2 = dict(positions="learned", norm="layernorm", mlp="gelu", head_dim=2)
GPT2 |= dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
BIASES = dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
# Name -> (what sets the family apart, dtype of the file, number of files).
MODELS = {
    "gpt2": (GPT2, np.float32, 1),
    "gpt2-untied": (GPT2 | {"tie_embeddings": False}, ml_dtypes.bfloat16, 3),
    "llama": ({"tie_embeddings": False}, ml_dtypes.bfloat16, 3),
    "llama-tied": ({}, np.float32, 1),
    "llama-biases": (BIASES | {"tie_embeddings": False}, np.float16, 2),
    "qwen2": ({"qkv_bias": True}, np.float16, 2),
    "qwen3": ({"qk_norm": True, "tie_embeddings": False}, np.float32, 3),
}


def layout_of(mesh, rules=RULES):
    data, fsdp, model = mesh
    settings = MeshSettings(data=data, fsdp=fsdp, model=model)
    return Layout(make_mesh(settings, jax.devices()), rules)


def write_model(folder, config, dtype=np.float32, num_files=1):
    """A folder of random numbers; (the parameters as they are read, tensors in the files)."""
    shapes = jax.eval_shape(policy_network(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(dtype).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes)
    raw = write_config(config)
    tensors = hf.params_to_hf(config, raw["model_type"], params)
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    (folder / "config.json").write_text(json.dumps(raw))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return params, tensors
    where = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({k: x for k, x in tensors.items() if where[k] == file}, folder / file)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": where}))
    return params, tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            options, dtype, num_files = MODELS[name]
            config = ModelConfig(**{"num_layers": 2, "max_length": 32, **SIZES, **options})
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, *write_model(folder, config, dtype, num_files))
        return made[name]

    return get


def assert_laid_out(params, layout, host):
    """The arrays of the host's tree bit for bit, and each where the layout says."""
    assert_same_tree(jax.tree.map(np.asarray, params), host)
    expected = layout.shardings(host)
    assert jax.tree.map(lambda x: x.sharding, params) == expected
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


# --- pretrained models ----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_the_same_in_pieces_and_on_the_host(saved, name, mesh):
    folder, written, _ = saved(name)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name.split("-")[0]
    assert_same_tree(hf.load_policy(folder)[1], written)
    for scan_layers in (False, True):
        for rules in (RULES, ROLLOUT_RULES):
            layout = layout_of(mesh, rules)
            config, host = hf.load_policy(folder, scan_layers=scan_layers)
            again, params = hf.load_policy(
                folder, scan_layers=scan_layers, shardings=layout.shardings
            )
            assert again == config
            assert_laid_out(params, layout, host)


def test_scanned_layers_may_be_cut_as_well(saved):
    folder, *_ = saved("gpt2")
    layout = layout_of((2, 2, 2), AxisRules(layers=("data",)))
    _, host = hf.load_policy(folder, scan_layers=True)
    _, params = hf.load_policy(folder, scan_layers=True, shardings=layout.shardings)
    assert params["layers"]["stack"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape[0] == 1
    assert_laid_out(params, layout, host)


def test_what_was_loaded_may_be_donated(saved):
    """The copies of a parameter have no memory in common that a program may write to."""
    folder, written, _ = saved("llama-tied")
    layout = layout_of((8, 1, 1))
    _, params = hf.load_policy(folder, shardings=layout.shardings)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    doubled = double(params)
    for x, y in zip(jax.tree.leaves(doubled), jax.tree.leaves(written), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * y)


def test_a_mesh_that_does_not_fit_is_named_before_anything_is_read(saved, monkeypatch):
    folder, *_ = saved("llama")
    layout = layout_of((1, 1, 8), AxisRules(embed=("model",)))
    reads = count_reads(monkeypatch)
    with pytest.raises(ValueError, match="twice over the mesh axis model"):
        hf.load_policy(folder, shardings=layout.shardings)
    assert not reads


# --- what is read, and what is held ---------------------------------------------------------------


class CountedSlice:
    def __init__(self, name, inner, reads):
        self.name, self.inner, self.reads = name, inner, reads
        self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

    def __getitem__(self, index):
        part = self.inner[index]
        self.reads.append((self.name, part.nbytes))
        return part


class CountedFile:
    def __init__(self, inner, reads):
        self.inner, self.reads, self.keys = inner, reads, inner.keys

    def get_slice(self, name):
        return CountedSlice(name, self.inner.get_slice(name), self.reads)


def count_reads(monkeypatch):
    """A list that gets (tensor, bytes) of every read from a weight file."""
    reads = []

    @contextlib.contextmanager
    def safe_open(path, **how):
        with safetensors.safe_open(path, **how) as file:
            yield CountedFile(file, reads)

    monkeypatch.setattr(hf, "safe_open", safe_open)
    return reads


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
    """(bytes that Python and numpy held at once while parameters were read, the parameters)."""
    config = hf.load_config(folder, scan_layers=scan_layers)
    with hf.open_weights(folder) as files:
        stored = hf_tensors.find_parameters(config, "llama", files)
        hf_tensors.read_parameters(stored, shardings)  # what is made once is not counted
        tracemalloc.start()
        try:
            params = hf_tensors.read_parameters(stored, shardings)
            return tracemalloc.get_traced_memory()[1], params
        finally:
            tracemalloc.stop()


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


# --- checkpoints and stages -----------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_checkpoints_are_restored_into_pieces(saved, tmp_path, mesh):
    params, layout = saved("qwen3")[1], layout_of(mesh)
    save_params(tmp_path / "params", params)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(3, {"policy_params": params, "kl_coef": np.float32(0.5)})
    checkpoints.close()
    assert_laid_out(load_params(tmp_path / "params", layout.shardings), layout, params)
    for step in (None, 3):
        field = load_checkpoint_item(
            tmp_path / "run", "policy_params", step, shardings=layout.shardings
        )
        assert_laid_out(field, layout, params)


def test_a_mesh_that_does_not_fit_is_no_damage_of_a_checkpoint(saved, tmp_path):
    params, layout = saved("qwen3")[1], layout_of((1, 1, 8), AxisRules(embed=("model",)))
    save_params(tmp_path / "params", params)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(3, {"params": params})
    checkpoints.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that is passed over is told in a warning
        for load in (
            lambda: load_params(tmp_path / "params", layout.shardings),
            lambda: load_checkpoint_item(tmp_path / "run", "params", shardings=layout.shardings),
        ):
            with pytest.raises(ValueError, match="^(params/)?embed/tokens: the rules cut it twice"):
                load()


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train_tokenizer(["a film of few words"] * 3, 304)


def trained_stage(folder, tokenizer, *, scan_layers):
    """A complete stage, of whose two layers the upper one is trained."""
    sizes = SIZES | {"vocab_size": 304, "num_layers": 2, "max_length": 32}
    config = ModelConfig(**sizes, scan_layers=scan_layers)
    network = policy_network(config)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    model = Model(kind="policy", config=config, params=params, tokenizer=tokenizer)
    parts = split_params(config, params, 1, 1)
    begin_stage(folder, model, parts, {"stage": "sft", "num_steps": 3, "settings": {}})
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": parts.trained})
    checkpoints.close()


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_stage_is_loaded_into_pieces_and_stays_there(tmp_path, tokenizer, scan_layers, asked):
    trained_stage(tmp_path / "sft", tokenizer, scan_layers=scan_layers)
    layout, settings = layout_of((2, 2, 2)), None
    if asked is not None:
        settings = ModelSettings(path="x", dtype="bfloat16", scan_layers=asked, remat="dots")
    host = load_model(tmp_path / "sft", settings)
    model = load_model(tmp_path / "sft", settings, layout)
    assert model.config == host.config
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host.params))
    assert_laid_out(model.params, layout, host.params)
    assert host.config.remat == ("none" if asked is None else "dots")
    if settings is not None:
        again = load_source("sft", tmp_path, "base", settings, layout)
        assert_laid_out(again.params, layout, host.params)


def test_a_pretrained_model_is_loaded_into_pieces(saved, tmp_path, monkeypatch):
    folder, *_ = saved("qwen2")
    layout = layout_of((2, 2, 2))
    settings = ModelSettings(path="x", scan_layers=True, remat="full")
    monkeypatch.setattr(vocabulary, "load_tokenizer", lambda path: range(48))
    host = load_model(folder, settings)
    model = load_source("base", tmp_path, str(folder), settings, layout)
    assert model.config == host.config and model.config.remat == "full"
    assert_laid_out(model.params, layout, host.params)
