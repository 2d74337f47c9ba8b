"""What the scripts have in common: their flags, and mistakes that are told in one line."""

import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import config_dict, config_flags

from ppo_jax import pipeline
from ppo_jax.config import STAGES

USER_MISTAKE, INTERRUPTED = 2, 130  # exit codes
OURS = pathlib.Path(__file__).parent


def run_stages(only: Sequence[str] = STAGES):
    """A script that runs stages of a config: its flags, its run.

    Args:
        only: the stages.
    """
    config = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
    workdir = flags.DEFINE_string("workdir", None, "The run's folder.")
    flags.mark_flags_as_required(["config", "workdir"])
    for name in ("config", "workdir"):  # so that --help of the script lists them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def main():
        if not isinstance(config.value, config_dict.ConfigDict):
            name = config_flags.get_config_filename(flags.FLAGS["config"])
            raise ValueError(f"--config must be a config file, got {name!r}, which is not there")
        pipeline.run(config.value, workdir.value, only=only)

    run(main)


def run(main: Callable[[], None]):
    """Parse the flags and call `main`; a user's mistake is one line and exit code 2.

    An error that this package raises itself is about what it was given. One that is raised
    anywhere else is a bug, and keeps its traceback.

    Args:
        main: the script.
    """
    sys.exit(app.run(lambda _: call(main), flags_parser=parse_flags))


def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        stop(f"{one_line(error)}; --help lists the flags", USER_MISTAKE)
    if len(rest) > 1:
        stop(f"unexpected arguments {rest[1:]}; --help lists the flags", USER_MISTAKE)
    return rest


def call(main: Callable[[], None]):
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    except FloatingPointError as error:
        stop(one_line(error), 1)
    except (ValueError, ConnectionError, OSError) as error:
        if not raised_by_us(error):
            raise
        stop(one_line(error), USER_MISTAKE)


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame of an error is in this package or in a script."""
    frames = traceback.extract_tb(error.__traceback__)
    path = pathlib.Path(frames[-1].filename)
    return path.is_relative_to(OURS) or path.parent == pathlib.Path(sys.argv[0]).resolve().parent


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines()]
    lines = [line for line in lines if line not in ("", ";")]
    return lines[-1] if any("Traceback" in line for line in lines) else "; ".join(lines)


def stop(message: str, code: int):
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
