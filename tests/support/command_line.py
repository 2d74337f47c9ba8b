"""The scripts of experiments/ with their flags, inside of this process: no start to wait for."""

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys
from unittest import mock

from absl import flags

from ppo_jax import cli

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
    out, err, code = io.StringIO(), io.StringIO(), 0
    old_flags = set(flags.FLAGS)
    with (
        mock.patch.object(sys, "argv", [path, *arguments]),
        mock.patch.object(sys, "path", list(sys.path)),
        # absl's own sets up logging and --help, which a process can do once.
        mock.patch.object(cli.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            flags.FLAGS.remove_flag_values(set(flags.FLAGS) - old_flags)
            flags.FLAGS.unparse_flags()
            # What defines flags as it is loaded: the config file, and the benchmarks.
            for module in [
                m for m in sys.modules if m.split(".")[0] in ("config_config", "benchmarks")
            ]:
                del sys.modules[module]
    return Ended(code, out.getvalue(), err.getvalue())
