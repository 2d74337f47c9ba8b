"""The scripts of experiments/ and `ppo-jax` with their flags, inside of this process."""

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys
from collections.abc import Callable
from unittest import mock

from absl import flags

from ppo_jax import cli, commands

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str


def run_script(name: str, *arguments: str) -> Ended:
    """Run `experiments/NAME.py` as `python` would, with the flags of this run alone."""
    path = str(ROOT / "experiments" / f"{name}.py")
    return run_main(lambda: runpy.run_path(path, run_name="__main__"), path, *arguments)


def run_command(*arguments: str) -> Ended:
    """Run `ppo-jax` as a shell would, with the flags of this run alone."""
    return run_main(commands.main, "ppo-jax", *arguments)


def run_main(main: Callable[[], object], *argv: str) -> Ended:
    """Call `main` with these arguments of the process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    old_flags, about = set(flags.FLAGS), sys.modules["__main__"].__doc__
    with (
        mock.patch.object(sys, "argv", list(argv)),
        mock.patch.object(sys, "path", list(sys.path)),
        # absl's own sets up logging and --help, which a process can do once.
        mock.patch.object(cli.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.modules["__main__"].__doc__ = about
            flags.FLAGS.remove_flag_values(set(flags.FLAGS) - old_flags)
            flags.FLAGS.unparse_flags()
            # What defines flags as it is loaded: the config file, and the benchmarks.
            for module in [
                m for m in sys.modules if m.split(".")[0] in ("config_config", "benchmarks")
            ]:
                del sys.modules[module]
    return Ended(code, out.getvalue(), err.getvalue())
