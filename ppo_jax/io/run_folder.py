"""Files of a run's folder: config.json, results.json and JSON lines.

Only process 0 writes. A line is written whole and flushed, so a killed process tears at most the
last one; `drop_lines_after` removes it, together with what a resumed run will write again.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.config.run import STAGE_NAMES
from ppo_jax.data.atomic import atomic_write, naming_file
from ppo_jax.data.readers import short_repr
from ppo_jax.io.integrity import read_json
from ppo_jax.io.metric_names import with_former_names, with_new_names

PACKAGES = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
PACKAGES += ("transformers", "tokenizers", "safetensors")
WORKDIR = "{workdir}"  # stands for the run's folder in the paths of a config


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, whole lines at once; process 0 only.

    Args:
        path: for instance workdir/samples.jsonl.
        rows: what JSON can hold; NaN and infinity become null.
    """
    if jax.process_index() != 0:
        return
    lines = [json.dumps(_plain(row, nonfinite=lambda x: None), ensure_ascii=False) for row in rows]
    with naming_file(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def drop_lines_after(path: str | Path, stage: str, step: int | None) -> None:
    """Drop the lines of a stage past a step, and a torn last line; process 0 only, atomic.

    Lines of other stages stay as they are, byte for byte.

    Args:
        path: a file of JSON lines with "stage" and "step"; it may be absent.
        stage: whose lines.
        step: the last step that stays; None drops all lines of the stage.

    Raises:
        ValueError: a line before the last is not such an object.
    """
    path = Path(path)
    if jax.process_index() != 0 or not path.exists():
        return
    # Behind the last newline: nothing, or a line torn as it was written.
    *complete, torn = path.read_bytes().split(b"\n")
    kept = [x for n, x in enumerate(complete, 1) if not _is_after(x, stage, step, f"{path}:{n}")]
    if torn or len(kept) < len(complete):
        atomic_write(path, b"".join(line + b"\n" for line in kept))


def prepare_workdir(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Make the workdir and write its config.json, before the first step; process 0 only.

    The file holds the config, the git commit of the source (null when it is not a checkout),
    package versions, Python's version, and kind and number of the devices.

    Args:
        workdir: the folder.
        config: nested dicts; infinity is written as "inf".
    """
    if jax.process_index() != 0:
        return
    Path(workdir).mkdir(parents=True, exist_ok=True)
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    record = {
        "config": _plain(config, nonfinite=str),
        "git_commit": _git_commit(),
        "packages": _package_versions(),
        "python": platform.python_version(),
        "devices": {"kind": kind, "count": count, "processes": jax.process_count()},
    }
    write_object(Path(workdir) / "config.json", record)


def write_object(path: str | Path, values: Any) -> None:
    """Write JSON, whole or not at all; infinity is written as "inf"."""
    text = json.dumps(_plain(values, nonfinite=str), indent=2, ensure_ascii=False)
    atomic_write(path, text + "\n")


def read_record(workdir: str | Path) -> dict[str, Any]:
    """What config.json holds; {} where there is no such file.

    Raises:
        ValueError: the file is not one that `prepare_workdir` wrote.
    """
    path = Path(workdir) / "config.json"
    record = read_object(path, {"config": "an object"}) or {}
    sections = {name: "an object or null" for name in ("model", "mesh", *STAGE_NAMES)}
    if wrong := wrong_value(record.get("config", {}), sections.get):
        raise ValueError(f"{path}: config.{wrong}")
    return record


def read_config(workdir: str | Path) -> dict[str, Any] | None:
    """The config in a workdir's config.json, or None where there is no such file.

    Raises:
        ValueError: the file is not one that `prepare_workdir` wrote.
    """
    path, record = Path(workdir) / "config.json", read_record(workdir)
    if path.exists() and "config" not in record:
        raise ValueError(f"{path} must have the field config")
    return record.get("config")


def read_results(workdir: str | Path) -> dict[str, Any]:
    """What results.json holds; empty where there is no such file.

    Raises:
        ValueError: the file is not one that `write_results` wrote.
    """
    path = Path(workdir) / "results.json"
    results = with_new_names(read_object(path) or {})
    if wrong := wrong_value(results, kind_of_result):
        raise ValueError(f"{path}: {wrong}")
    return results


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl or of samples.jsonl; empty where there is no such file.

    A torn last line is that of a run under way, or of a killed one.

    Returns:
        (the rows, what is wrong with each line that is left out, with its number).
    """
    path, rows, left_out = Path(path), [], []
    if not path.is_file():
        return rows, left_out
    needed = {"stage", "step"} | ({"prompt", "response"} if path.name == "samples.jsonl" else set())
    *complete, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(complete, 1):
        if not line.strip():
            continue
        try:
            row = with_new_names(json.loads(line))
            if not isinstance(row, dict):
                raise ValueError("it must be a JSON object")
            if lacks := sorted(needed - row.keys()):
                raise ValueError(f"it lacks {lacks}")
            if wrong := wrong_value(row, kind_of_result):
                raise ValueError(wrong)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            left_out.append(f"{path.name}:{number} ({error})")
    return rows, left_out


def read_object(path: Path, kinds: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """A JSON object that a run keeps in a file; None where there is no such file.

    Args:
        path: of the file.
        kinds: {field: what it holds}, words of `KINDS`; other fields may hold anything.

    Raises:
        ValueError: it holds something else; the file and the field are named.
    """
    if not path.exists():
        return None
    values = read_json(path, finite=False)
    if wrong := wrong_value(values, (kinds or {}).get):
        raise ValueError(f"{path}: {wrong}")
    return values


def _is_number(value: Any) -> bool:
    """Python reads whole numbers of any length, which are no floats."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda x: isinstance(x, str),
    "true or false": lambda x: isinstance(x, bool),
    "a number": _is_number,
    "a number or null": lambda x: x is None or _is_number(x),
    "a whole number": lambda x: type(x) is int and _is_number(x),
    "two numbers": lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_number, x)),
    "an object": lambda x: isinstance(x, dict),
    "an object or null": lambda x: x is None or isinstance(x, dict),
    "an object of numbers": lambda x: isinstance(x, dict) and all(map(_is_number, x.values())),
    "a list of objects": lambda x: isinstance(x, list) and all(isinstance(y, dict) for y in x),
}
RESULTS = (  # the first pattern that fits the name of a figure
    ("stage|judge|note|prompt|response|headline_judge", "a text"),
    ("step|num_prompts", "a whole number"),
    ("judges|samples", "a list of objects"),
    ("reference|scores", "an object of numbers"),
    ("evaluated", "an object"),
    (".*_interval", "two numbers"),
    ("time/.*", "a number"),
    ("score|.*/.*|(mean|pair|win)_.*", "a number or null"),
)


def kind_of_result(name: str) -> str | None:
    """What a figure of metrics.jsonl, samples.jsonl or results.json holds; None is anything.

    >>> kind_of_result("kl/ref"), kind_of_result("step"), kind_of_result("mine")
    ('a number or null', 'a whole number', None)
    """
    return next((kind for names, kind in RESULTS if re.fullmatch(names, name)), None)


def wrong_value(values: Mapping[str, Any], kind_of: Callable[[str], str | None]) -> str:
    """The first field of an object that does not hold what it must, in words; "" is none.

    >>> wrong_value({"judges": [{"judge": 1}]}, kind_of_result)
    'judges: judge must be a text, got 1'
    """
    for name, value in values.items():
        kind = kind_of(name)
        if kind is not None and not KINDS[kind](value):
            return f"{name} must be {kind}, got {short_repr(value)}"
        for row in value if kind == "a list of objects" else ():
            if wrong := wrong_value(row, kind_of):
                return f"{name}: {wrong}"
    return ""


def write_results(workdir: str | Path, results: Mapping[str, Any]) -> None:
    """Write results.json, whole or not at all; process 0 only."""
    if jax.process_index() == 0:
        both = with_former_names(_plain(results, nonfinite=lambda x: None))
        write_object(Path(workdir) / "results.json", both)


def keep_time(workdir: str | Path, part: str, seconds: float) -> None:
    """Have the wall seconds of a part of the run in results.json, and their sum over all parts."""
    results = read_results(workdir) | {f"time/{part}_s": seconds}
    parts = [v for k, v in results.items() if k.startswith("time/") and k != "time/total_s"]
    write_results(workdir, results | {"time/total_s": sum(parts)})


def fill_in_workdir(settings: Any, workdir: Path) -> Any:
    """The same settings with `{workdir}` in every string replaced by the folder."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str):
            value = value.replace(WORKDIR, str(workdir))
        elif dataclasses.is_dataclass(value):
            value = fill_in_workdir(value, workdir)
        values[field.name] = value
    return type(settings)(**values)


def without_workdir(values: Any, workdir: Path) -> Any:
    """Nested dicts with `{workdir}/` for the folder again, which may be moved or renamed."""
    if isinstance(values, dict):
        return {name: without_workdir(value, workdir) for name, value in values.items()}
    inside = isinstance(values, str) and values.startswith(f"{workdir}/")
    return f"{WORKDIR}/" + values.removeprefix(f"{workdir}/") if inside else values


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs differ, as JSON has them.

    >>> config_differences({"ppo": {"kl_coef": 0.1}, "seed": 0}, {"ppo": {"kl_coef": 0.2}})
    ['ppo.kl_coef: 0.1 -> 0.2', 'seed: 0 -> absent']
    """
    old, new = _flat(_plain(old, nonfinite=str)), _flat(_plain(new, nonfinite=str))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]


def _plain(value: Any, nonfinite: Callable[[float], Any]) -> Any:
    """The value as JSON has it: lists, Python's numbers, `nonfinite(x)` for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x, nonfinite) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x, nonfinite) for x in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist(), nonfinite)
    if isinstance(value, float) and not math.isfinite(value):
        return nonfinite(value)
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo.kl_coef": 0.1, ...}; an empty dict is a value."""
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        fields |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return fields


def _is_after(line: bytes, stage: str, step: int | None, place: str) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] == stage and (step is None or row["step"] > step)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: must be a JSON object with stage and step: {error!r}."
        ) from error


def _package_versions() -> dict[str, str]:
    installed = {x.metadata["Name"]: x.version for x in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _git_commit() -> str | None:
    """The commit of this source, with "-dirty" when files were changed; None outside a checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return done.stdout.strip()
