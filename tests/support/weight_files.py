"""Weight files of random numbers by family, and a count of what is read of them."""

import contextlib
import json

import jax
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ppo_jax.io import huggingface as hf
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import write_config

SIZES = dict(vocab_size=48, embed_dim=16, mlp_dim=24, num_heads=8, num_kv_heads=8, head_dim=6)
GPT2 = dict(positions="learned", norm="layernorm", mlp="gelu", head_dim=2)
GPT2 |= dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
BIASES = dict(qkv_bias=True, attention_output_bias=True, mlp_bias=True)
NEOX = GPT2 | dict(mlp="gelu_erf", residual="parallel", positions="rotary")
NEOX |= dict(head_dim=2, tie_embeddings=False)
# Name -> (what sets the family apart, dtype of the file, number of files).
MODELS = {
    "gpt2": (GPT2, np.float32, 1),
    "gpt2-untied": (GPT2 | {"tie_embeddings": False}, ml_dtypes.bfloat16, 3),
    "llama": ({"tie_embeddings": False}, ml_dtypes.bfloat16, 3),
    "llama-tied": ({}, np.float32, 1),
    "llama-biases": (BIASES | {"tie_embeddings": False}, np.float16, 2),
    "qwen2": ({"qkv_bias": True}, np.float16, 2),
    "qwen3": ({"qk_norm": "head", "tie_embeddings": False}, np.float32, 3),
    "gpt_neox": (NEOX, np.float32, 2),
    "phi3": ({"rotary_dim": 4, "tie_embeddings": False}, ml_dtypes.bfloat16, 2),
}


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


def saver(make_folder):
    """name -> (folder, parameters, tensors) of a model of `MODELS`, each made once."""
    made = {}

    def get(name):
        if name not in made:
            options, dtype, num_files = MODELS[name]
            config = ModelConfig(**{"num_layers": 2, "max_length": 32, **SIZES, **options})
            folder = make_folder(name)
            made[name] = (folder, *write_model(folder, config, dtype, num_files))
        return made[name]

    return get


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
