"""What the scripts have in common: their flags, and mistakes that are told in one line."""

import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import config_dict, config_flags

from ppo_jax import pipeline
from ppo_jax.config import STAGES
from ppo_jax.overrides import check_overrides, explain

USER_MISTAKE, INTERRUPTED = 2, 130  # exit codes
OURS = pathlib.Path(__file__).parent


def run_stages(only: Sequence[str] = STAGES):
    """A script that runs stages of a config: its flags, its run.

    Args:
        only: the stages.
    """
    config = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
    workdir = flags.DEFINE_string("workdir", None, "The run's folder.")
    dry_run = flags.DEFINE_boolean(
        "dry_run", False, "Print the plan and the first examples of the data; train nothing."
    )
    flags.DEFINE_alias("dry-run", "dry_run")
    flags.mark_flags_as_required(["config", "workdir"])
    for name in ("config", "workdir", "dry_run"):  # so that --help of the script lists them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def main():
        if not isinstance(config.value, config_dict.ConfigDict):
            name = config_flags.get_config_filename(flags.FLAGS["config"])
            kind = type(config.value).__name__
            raise ValueError(f"get_config() of {name} must return a ConfigDict, got a {kind}")
        start = pipeline.dry_run if dry_run.value else pipeline.run
        start(config.value, workdir.value, only=only)

    run(main)


def run(main: Callable[[], None]):
    """Parse the flags and call `main`; a user's mistake is one line and exit code 2.

    An error that this package raises itself is about what it was given. One that is raised
    anywhere else is a bug, and keeps its traceback.

    Args:
        main: the script.
    """
    # transformers would say at every start that its models need torch; we use its tokenizers.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.exit(app.run(lambda _: call(main), flags_parser=parse_flags))


def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        check_overrides(argv)
        rest = flags.FLAGS(argv)
    except Exception as error:  # flags and config files are the user's
        stop(f"{explain(error)}; --help lists the flags", USER_MISTAKE)
    if len(rest) > 1:
        stop(f"unexpected arguments {rest[1:]}; --help lists the flags", USER_MISTAKE)
    return rest


def call(main: Callable[[], None]):
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted", INTERRUPTED)
    except FloatingPointError as error:
        stop(one_line(error), 1)
    except (ValueError, ConnectionError) as error:
        if not raised_by_us(error):
            raise
        stop(one_line(error), USER_MISTAKE)
    except OSError as error:  # a full disk, a folder that cannot be written
        stop(str(error), 1)


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame of an error is in this package or in a script."""
    frames = traceback.extract_tb(error.__traceback__)
    path = pathlib.Path(frames[-1].filename)
    return path.is_relative_to(OURS) or path.parent == pathlib.Path(sys.argv[0]).resolve().parent


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines()]
    return "; ".join(line for line in lines if line not in ("", ";"))


def stop(message: str, code: int):
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
