"""The package as people install it: the built wheel, used outside of the clone."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support.command_line import ROOT
from tests.support.finished_run import finished_run

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "README.md", "LICENSE")

# Every module of every package, a report with its template and style, and the console command.
USE = """
import importlib, pathlib, pkgutil, sys
import ppo_jax
from ppo_jax.evaluation.report.report import write_report

lib, run = map(pathlib.Path, sys.argv[1:])
assert pathlib.Path(ppo_jax.__file__).is_relative_to(lib), ppo_jax.__file__
names = [m.name for m in pkgutil.walk_packages(ppo_jax.__path__, "ppo_jax.")]
for name in names:
    importlib.import_module(name)
page = write_report(run).read_text()
assert "<style" in page and "</html>" in page
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the clone's files, built in a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "ppo_jax", folder / "ppo_jax")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", "."]
    subprocess.run(command, cwd=folder, check=True)
    (path,) = (folder / "dist").iterdir()
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel):
    built = set(zipfile.ZipFile(wheel).namelist())
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "ppo_jax").rglob("*") if p.is_file()}
    assert not {name for name in tree if "__pycache__" not in name} - built


def test_an_installed_package_imports_reports_and_lists_its_commands(
    wheel, tmp_path, tmp_path_factory
):
    lib, run = tmp_path / "lib", tmp_path / "run"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(lib)]
    subprocess.run([*pip, str(wheel)], check=True)
    shutil.copytree(finished_run(tmp_path_factory), run)
    environment = os.environ | {"PYTHONPATH": str(lib)}

    def start(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    modules = len(list((ROOT / "ppo_jax").rglob("*.py"))) - 1  # but for ppo_jax itself
    assert int(start(sys.executable, "-c", USE, str(lib), str(run))) == modules
    assert "generate" in start(sys.executable, str(lib / "bin" / "ppo-jax"), "--help")
