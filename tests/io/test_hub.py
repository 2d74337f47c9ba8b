"""Where models and texts come from, without a network but for one small download."""

import hashlib
import zipfile

import huggingface_hub
import pytest

from ppo_jax.io import hub

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


@pytest.mark.parametrize("change", ["cut", "flipped", "removed"])
def test_a_file_of_the_cache_that_has_changed_is_named(tmp_path, change):
    def write(folder):
        (folder / "rows.txt").write_bytes(b"a\nb\nc\n")

    folder = hub.make_once(tmp_path / "texts", write)
    assert hub.make_once(folder, write) == folder
    path = folder / "rows.txt"
    path.unlink()
    if change != "removed":
        path.write_bytes({"cut": b"a\nb\n", "flipped": b"a\nb\nd\n"}[change])
    with pytest.raises(ValueError, match=r"texts: rows\.txt .* Delete the folder and start again"):
        hub.make_once(folder, write)


@pytest.mark.parametrize("name", ["../x", "..", ".", "./x", "a/..", "a/../b", "a/b/c", "~/x", "-x"])
def test_a_path_is_no_id_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_folder", None)
    with pytest.raises(ValueError, match="no folder or .gguf file|has no config"):
        hub.model_folder(name if name not in (".", "..") else name + "/x")


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


def test_a_damaged_file_of_weights_in_the_cache_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path))
    path, whole = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF" + bytes(100)
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(whole).hexdigest())
    path.write_bytes(whole)
    assert hub.smollm2_gguf() == path
    for damaged in (whole[:-1], b"GGUF" + bytes(99) + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"Q4_1\.gguf has SHA-256 .*: delete it and start again"
        ):
            hub.package_model("smollm2-135m-instruct")
    assert [x.name for x in tmp_path.iterdir() if not x.name.startswith(".")] == [path.name]
