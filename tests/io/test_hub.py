"""Where models and texts come from, without a network but for one small download."""

import hashlib
import json
import zipfile

import gguf
import huggingface_hub
import numpy as np
import pytest
import transformers
from film_reviews.data import film_ratings

from ppo_jax.io import gguf as gguf_reader
from ppo_jax.io import hub
from ppo_jax.io import huggingface as hf
from ppo_jax.io.tokenizers import load_tokenizer, train_tokenizer
from ppo_jax.models.build import policy_apply
from tests.support.tiny_hf import torch

WHEEL = "tiny_texts-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, with one wheel; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        info = "tiny_texts-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def fetch(sha256):
    return hub.fetch_package("tiny-texts", "1.0", WHEEL, sha256)


def test_a_package_is_fetched_once_and_then_cached(index):
    content = (index / WHEEL).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    path = fetch(digest)
    assert path == hub.cache_dir() / WHEEL and path.read_bytes() == content
    (index / WHEEL).unlink()
    assert fetch(digest) == path
    assert [p.name for p in hub.cache_dir().iterdir()] == [WHEEL]  # nothing half-written


def test_without_a_network_the_error_says_what_to_run_and_where_to_put_the_file(index):
    (index / WHEEL).unlink()
    with pytest.raises(ConnectionError) as error:
        fetch("0" * 64)
    message = str(error.value)
    assert "pip download tiny-texts==1.0 --no-deps" in message
    assert WHEEL in message and str(hub.cache_dir()) in message


def test_a_file_with_another_hash_is_refused_by_pip_and_in_the_cache(index):
    with pytest.raises(ConnectionError):
        fetch("0" * 64)
    assert list(hub.cache_dir().iterdir()) == []
    (hub.cache_dir() / WHEEL).write_bytes(b"put here by hand")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch("0" * 64)


def test_a_folder_is_made_once_and_never_left_half_made(tmp_path):
    def fail(partial):
        (partial / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.make_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
    calls = []

    def write(partial):
        calls.append(partial)

    for _ in range(2):
        assert hub.make_once(tmp_path / "model", write) == tmp_path / "model"
    assert len(calls) == 1 and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_path_that_leads_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no folder or .gguf file"):
        hub.model_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a local folder nor .* hub"):
        hub.model_folder("nobody-at-all/no-such-model")
    with pytest.raises(ValueError, match=r"package:nothing.*smollm2-135m-instruct"):
        hub.model_folder("package:nothing")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a folder nor a .gguf file"):
        hub.model_folder(tmp_path / "model.bin")


def test_of_a_hub_repository_only_weights_config_and_tokenizer_are_fetched(tmp_path, monkeypatch):
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "merges.txt"]
    unwanted = ["pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors", "modeling.py"]
    fetched = []

    def snapshot_download(repo, **patterns):
        assert repo == "somebody/some-model"
        fetched.extend(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.model_folder("somebody/some-model") == tmp_path
    assert fetched == wanted


@pytest.fixture(scope="module")
def tiny_llama():
    pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(path, model, tokenizer, *, quantise=None, **extra):
    """A GGUF file of a Llama, with the rows of query and key in GGUF's order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in spec["merges"]])
    writer.add_eos_token_id(0)
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in gguf_tensors(model):
        kind = quantise if quantise is not None and tensor.ndim == 2 else None
        if kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model):
    names = {name: key for key, name in gguf_reader.TENSORS.items()}
    parts = {name: key for key, name in gguf_reader.LAYER_TENSORS.items()}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            yield f"blk.{layer}.{parts[part]}", interleave(array, part, model.config.head_dim)
        else:
            yield names[name], array


def interleave(array, part, size):
    """Row j of the first half of each head, then row j of its second half, for all j."""
    if part not in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        return array
    order = [
        head + j + half
        for head in range(0, len(array), size)
        for j in range(size // 2)
        for half in (0, size // 2)
    ]
    return array[order]


def gguf_tokenizer():
    tokenizer = train_tokenizer([r.text for r in film_ratings()[:200]], 300)
    assert len(tokenizer) == 300
    return tokenizer


def test_a_gguf_file_gives_the_same_logits_and_tokens(tiny_llama, tmp_path, monkeypatch):
    tokenizer = gguf_tokenizer()
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, tokenizer)
    config, params = hf.load_policy(path)
    again = load_tokenizer(path)
    assert again.eos_token == "<|endoftext|>" and again.get_vocab() == tokenizer.get_vocab()
    text = "It isn't 1999, but a film.<|endoftext|> \n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    with torch.no_grad():
        theirs = tiny_llama(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    ours = policy_apply(config, params, tokens, np.ones(tokens.shape, bool))
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4
    assert len(list(hub.cache_dir().iterdir())) == 1  # the tokenizer came from the same folder


def test_quantised_weights_are_near_the_originals(tiny_llama, tmp_path, monkeypatch):
    tokenizer = gguf_tokenizer()
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    kind = gguf.GGMLQuantizationType.Q8_0
    _, params = hf.load_policy(
        write_gguf(tmp_path / "q8.gguf", tiny_llama, tokenizer, quantise=kind)
    )
    exact = tiny_llama.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    actual = params["layers"]["1"]["attention"]["query"]["kernel"].reshape(64, 64).T
    # 8 bits: half a step of 1/127 of the largest weight of a block of 32.
    assert 0 < np.abs(actual - exact).max() <= np.abs(exact).max() / 127


def test_a_gguf_option_or_file_that_is_not_understood_is_refused(tiny_llama, tmp_path, monkeypatch):
    tokenizer = gguf_tokenizer()
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "moe.gguf", tiny_llama, tokenizer, llama__expert_count=8)
    with pytest.raises(ValueError, match=r"llama\.expert_count=8"):
        hf.load_policy(path)
    (tmp_path / "text.gguf").write_text("not a model, but long enough to be looked at" * 9)
    with pytest.raises(ValueError, match=r"text\.gguf is not a readable GGUF file"):
        hf.load_policy(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="architecture 'mamba'"):
        gguf_reader.read_metadata({"general.architecture": "mamba"}, tied=True)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        gguf_reader.hf_name("blk.0.ffn_gate_inp.weight")
    with pytest.raises(ValueError, match="'llama' with pre-tokenizer 'default'"):
        gguf_reader.build_tokenizer(
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        )
