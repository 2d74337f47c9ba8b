"""What the scripts have in common: their flags, and mistakes that are told in one line."""

import errno
import os
import pathlib
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from ml_collections import config_dict, config_flags

from ppo_jax.config.flags import checked_flags, emptied, explain
from ppo_jax.config.parsing import FunctionFailed
from ppo_jax.config.run import STAGE_NAMES
from ppo_jax.distributed import processes
from ppo_jax.distributed.runtime import enable_compilation_cache, retain_freed_memory
from ppo_jax.io.hub import cache_dir
from ppo_jax.io.stage_folder import split_step
from ppo_jax.pipeline import run as pipeline

USER_MISTAKE, INTERRUPTED = 2, 130  # exit codes
OURS, PYTHON = pathlib.Path(__file__).parent, sysconfig.get_path("stdlib")


def run_stages(only: Sequence[str] = STAGE_NAMES):
    """A script that runs stages of a config: its flags, its run.

    Args:
        only: the stages.
    """
    config = config_flag()
    workdir = flags.DEFINE_string("workdir", None, "The run's folder.")
    dry_run = flags.DEFINE_boolean(
        "dry_run", False, "Print the plan and the first examples of the data; train nothing."
    )
    flags.DEFINE_alias("dry-run", "dry_run")
    multihost = multihost_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    show_in_help(config, workdir, dry_run, *multihost)

    def main():
        if multihost[0].value and dry_run.value:
            raise ValueError("--dry_run is for one process: leave --multihost out")
        join_processes(*multihost)
        processes.end_on_second_signal()
        start = pipeline.dry_run if dry_run.value else pipeline.run
        start(config_of(config), workdir.value, only=only)

    run(main)


def multihost_flags() -> tuple[flags.FlagHolder, ...]:
    """Define --multihost, --coordinator, --num_processes and --process_id."""
    about = "This is one of several processes, on a TPU pod for instance."
    where = "HOST:PORT of process 0, where jax does not find it by itself."
    return (
        flags.DEFINE_boolean("multihost", False, about),
        flags.DEFINE_string("coordinator", None, where),
        flags.DEFINE_integer("num_processes", None, "Number of processes; see --coordinator."),
        flags.DEFINE_integer("process_id", None, "Index of this process; see --coordinator."),
    )


def join_processes(multihost: flags.FlagHolder, *addresses: flags.FlagHolder):
    """Join the others with --multihost, before anything else of jax.

    Args:
        multihost: the first of `multihost_flags`.
        addresses: the others.

    Raises:
        ValueError: an address without --multihost, or none where it is needed.
    """
    if multihost.value:
        processes.initialize(*(flag.value for flag in addresses))
    elif any(flag.value is not None for flag in addresses):
        raise ValueError("--coordinator, --num_processes and --process_id need --multihost")


def config_of(flag: flags.FlagHolder) -> config_dict.ConfigDict:
    """The value of --config.

    Raises:
        ValueError: the file gives something else.
    """
    if not isinstance(flag.value, config_dict.ConfigDict):
        name, kind = config_filename(), type(flag.value).__name__
        raise ValueError(f"get_config() of {name} must return a ConfigDict, got a {kind}")
    return flag.value


def config_filename() -> str:
    """What --config names, with its variant."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def config_flag() -> flags.FlagHolder:
    """Define --config, a file relative to the working folder, and --config.SECTION.FIELD."""
    text = "FILE.py or FILE.py:VARIANT; its settings are flags, see docs/configuration.md"
    try:  # ml_collections would read a --flagfile now, and its settings would not be checked
        sys.argv[:] = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    except Exception as error:
        stop(f"{explain(error)} (--help lists the flags)", USER_MISTAKE)
    return config_flags.DEFINE_config_file("config", help_string=text)


def stage_flag(names: Sequence[str], about: str, **options: bool) -> flags.FlagHolder:
    """Define --stage, one of `names` or, as NAME@STEP or NAME@best, a checkpoint of it."""
    about = (
        f"{about}: <{'|'.join(names)}>; NAME@40 is its checkpoint of step 40, NAME@best its best."
    )
    holder = flags.DEFINE_string("stage", None, about, **options)
    flags.register_validator(
        "stage",
        lambda value: value is None or split_step(value.removesuffix("@best"))[0] in names,
        message=f"value should be one of <{'|'.join(names)}>",
    )
    return holder


def show_in_help(*holders: flags.FlagHolder):
    """Have --help list flags that are defined here and not in the script; call it last."""
    for holder in holders:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])


def run(main: Callable[[], None]):
    """Parse the flags and call `main`; a user's mistake is one line and exit code 2.

    An error that this package raises itself is about what it was given. One that is raised
    anywhere else is a bug, and keeps its traceback.

    Args:
        main: the script.
    """
    begin_process()
    sys.exit(app.run(lambda _: call(main), flags_parser=parse_flags))


def begin_process():
    """What every process of ours begins with, before jax has a device."""
    # transformers would say at every start that its models need torch; we use its tokenizers.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    enable_compilation_cache(cache_dir() / "compiled")
    retain_freed_memory()


def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        argv, none = emptied(checked_flags(argv))
        sys.argv[:] = argv  # where ml_collections looks for the values of a config
        rest = flags.FLAGS(argv)
        for name in none:
            set_none(flags.FLAGS["config"].value, name)
    except SystemExit:  # --help, for which absl has code 1
        sys.exit(0)
    except Exception as error:  # flags and config files are the user's
        stop(f"{explain(error)} (--help lists the flags)", USER_MISTAKE)
    if len(rest) > 1:
        stop(f"unexpected arguments {rest[1:]} (--help lists the flags)", USER_MISTAKE)
    return rest


def set_none(config: config_dict.ConfigDict, name: str):
    """Set "evaluate" or "model.scratch", for instance, of the value of --config to None."""
    section, _, field = name.rpartition(".")
    part = config[section] if section else config
    if part is None:
        raise ValueError(f"{name} cannot be set: the config has no section {section}")
    with part.unlocked(), part.ignore_type():
        part[field] = None


def call(main: Callable[[], None]):
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted", INTERRUPTED)
    except FloatingPointError as error:
        stop(one_line(error), 1)
    except FunctionFailed as error:  # of the user's own: what lies in it, without our frames
        if (cause := error.__cause__) and (frames := users_frames(cause.__traceback__)):
            traceback.print_exception(cause.with_traceback(frames))
        stop(one_line(error), 1)
    except (ValueError, ConnectionError) as error:
        if not raised_by_us(error):
            bug(error)
        stop(one_line(error), USER_MISTAKE)
    except OSError as error:  # a full disk, a folder that cannot be written
        stop(str(error), USER_MISTAKE if error.errno == errno.ENAMETOOLONG else 1)
    except Exception as error:
        bug(error)


def users_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback from the first frame on that is not this package's; None where all others are of
    Python's own library, which was called with what it does not take."""
    paths = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(trace)]
    if not any(
        "site-packages" in x.parts or not x.is_relative_to(PYTHON)
        for x in paths
        if not x.is_relative_to(OURS)
    ):
        return None
    while trace and pathlib.Path(trace.tb_frame.f_code.co_filename).is_relative_to(OURS):
        trace = trace.tb_next
    return trace


def bug(error: Exception):
    """An error with its traceback; of several processes, this one must not wait for the others."""
    if processes.is_initialized():
        traceback.print_exception(error)
        stop(f"ended by {type(error).__name__}", 1)
    raise error


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame of an error is in this package, a script or a benchmark."""
    frames = traceback.extract_tb(error.__traceback__)
    path, scripts = pathlib.Path(frames[-1].filename), pathlib.Path(sys.argv[0]).resolve().parent
    of_script = path.parent == scripts or path.is_relative_to(scripts / "benchmarks")
    return path.is_relative_to(OURS) or of_script


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines()]
    text = "; ".join(line for line in lines if line not in ("", ";"))
    return text.replace(":; ", ": ").replace(".; ", "; ")


def stop(message: str, code: int):
    # A name that is too long for a file is so for a line.
    message = re.sub(r"\S{999,}", lambda word: f"{word[0][:99]}...{word[0][-99:]}", message)
    who = f"process {jax.process_index()}: " if processes.is_initialized() else ""
    print(f"{pathlib.Path(sys.argv[0]).name}: {who}{message}", file=sys.stderr, flush=True)
    if processes.is_initialized():
        os._exit(code)  # a proper end would wait for the other processes
    sys.exit(code)
