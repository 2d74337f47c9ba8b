"""Programs are kept between processes, and the seconds of compiling are told."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.distributed.runtime import compile_seconds, enable_compilation_cache, processor
from tests.support import xla_flags
from tests.support.command_line import ROOT

PROGRAM = """
import jax, jax.numpy as jnp, json, pathlib, sys
from ppo_jax.distributed import runtime as compilation
compilation.MIN_COMPILE_SECONDS = 0.0
compilation.enable_compilation_cache(pathlib.Path(sys.argv[1]))
jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[0])(jnp.ones((64, 64))).block_until_ready()
print(json.dumps(compilation.compile_seconds()))
"""


def start(folder, program=PROGRAM, **environment):
    known = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        env=known | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    start(tmp_path)
    kept = sorted(path.name for path in (tmp_path / processor()).iterdir())
    assert any(name.endswith("-cache") for name in kept)
    start(tmp_path)
    programs = [name for name in kept if name.endswith("-cache")]
    again = sorted(path.name for path in (tmp_path / processor()).iterdir())
    assert [name for name in again if name.endswith("-cache")] == programs


@pytest.mark.parametrize(
    ("where", "kept"), [("", True), ("compilation.disable_compilation_cache()", False)]
)
def test_nothing_is_kept_from_there_on(tmp_path, where, kept):
    compile_first = "jax.jit(lambda x: x + 1)(1.0)\n"  # jax has asked whether there is a cache
    begin, _, end = PROGRAM.rpartition("jax.jit")
    start(tmp_path, program=f"{begin}{compile_first}{where}\njax.jit{end}")
    names = [path.name for path in tmp_path.rglob("*-cache")]
    assert any("lambda" in name for name in names)
    assert (len(names) > 1) == kept


def test_the_settings_of_jax_go_first(tmp_path):
    start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / processor()).exists()
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache(tmp_path)
    assert before is not None and jax.config.jax_compilation_cache_dir == before


def test_compiling_is_counted():
    before = compile_seconds()
    jax.jit(lambda x: jnp.sin(x) + before)(1.0)
    assert compile_seconds() > before


def test_flags_that_this_xla_lacks_are_left_out_of_the_tests(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(xla_flags, "CHEAP", (*xla_flags.CHEAP[:1], "--xla_of_another_version=1"))
    flags = xla_flags.of_tests().split()
    assert flags[0] == xla_flags.CHEAP[0] and "another" not in " ".join(flags)
    assert xla_flags.DEVICES + "8" in flags
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")  # of who asks for it
    assert xla_flags.of_tests().split() == ["--xla_backend_optimization_level=3", *flags[1:]]
