"""Eight fake CPU devices, no silent rank promotion, one compilation cache for all tests."""

import collections
import os
import pathlib

from tests.support import xla_flags

# Before jax is imported: the platform reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla_flags.of_tests()

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.distributed import layout as sharding

MOST_WORKERS = 4  # each takes two gigabytes
CACHE = pathlib.Path(os.environ.get("PPO_JAX_CACHE", "~/.cache/ppo_jax")).expanduser()

jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders are shared out to a process a core, file by file; single files run in this one.

    Of no concern without pytest-xdist, nor where `-n` says how many. A worker, which comes here
    too, must not start workers of its own.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folders = any(pathlib.Path(path).is_dir() for path in config.args)
    if folders and config.getoption("numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count(), MOST_WORKERS)
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests come first: the last file to end should be a short one."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def runs_use_one_device():
    """A run takes all devices; the tests' take one, but for those that ask for `all_devices`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "devices_of_run", lambda: jax.devices()[:1])
        yield


MOST_MAPS = 20_000  # of the 65,530 mappings that Linux gives a process


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Every compiled program holds mappings of memory as long as the process may call it again;
    with thousands of programs there are none left, and XLA aborts."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def all_devices(monkeypatch):
    """Runs inside the test take all eight devices."""
    monkeypatch.setattr(sharding, "devices_of_run", jax.devices)


@pytest.fixture
def strict():
    """No implicit dtype promotion. For the pure core alone: optax's adamw fails under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    """The two names that every doctest of the package may use."""
    doctest_namespace["jax"] = jax
    doctest_namespace["jnp"] = jnp
