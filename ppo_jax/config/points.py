"""Points of a sweep: what each changes in a config. From a grid, by chance, or listed.

A point is {dotted name of a setting: value}, {"ppo.kl_coef": 0.05, "seed": 1}. Nothing here reads
a file or knows of runs.
"""

import ast
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.config.flags import BOOLEANS, current_name, hint_of, section_of
from ppo_jax.config.parsing import NUMBERS, TEXTS, WORDS, Dtype, Limit, convert, options

Point = dict[str, Any]

MOST_POINTS = 10_000
LONGEST_NAME = 100  # characters of a folder's name
GRID = "'NAME=VALUE,VALUE; NAME=FIRST:END'"


@dataclasses.dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False  # even over their logarithms
    whole: bool = False  # whole numbers alone

    def draw(self, generator: np.random.Generator) -> float:
        """A number of the interval by chance."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = generator.uniform(*ends)
        return self.rounded(math.exp(value) if self.log else value)

    def rounded(self, value: float) -> float:
        """A number of the interval with four digits, so that its folder has a short name."""
        value = min(max(float(f"{value:.4g}"), self.low), self.high)
        return round(value) if self.whole else value


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes."""

    name: str
    values: tuple | Interval


def parse_grid(text: str) -> list[Axis]:
    """The axes of a grid, "ppo.kl_coef=0,0.02; seed=0:3; ppo.gamma=uniform(0.9,1)" for instance.

    `a:b` are the whole numbers from a to b - 1; `log(a,b)` and `uniform(a,b)` are intervals. Texts
    with a comma or a semicolon are quoted as in Python, lists are Python's: ('a','b').

    Raises:
        ValueError: a setting is unknown or given twice, has no value, or one that is not of its
            type or is given twice.

    >>> parse_grid("ppo.kl_coef=0,0.02; seed=0:2")
    [Axis(name='ppo.kl_coef', values=(0.0, 0.02)), Axis(name='seed', values=(0, 1))]
    """
    axes: list[Axis] = []
    for part in filter(str.strip, split_outside(text, ";")):
        name, equals, values = (x.strip() for x in part.partition("="))
        if not equals or not name:
            raise ValueError(f"--grid must be {GRID}, got {part.strip()!r}")
        name = checked_name(name)
        if name in [axis.name for axis in axes]:
            raise ValueError(f"--grid has {name} twice")
        axes.append(Axis(name, parse_values(name, values)))
    if not axes:
        raise ValueError(f"--grid must be {GRID}, got {text!r}")
    return axes


def checked_name(name: str) -> str:
    """The name of a setting as it is today; a section has none."""
    name = current_name(name)
    if cls := section_of(hint_of(name)):
        first = dataclasses.fields(cls)[0].name
        raise ValueError(f"{name} is a section: a point changes a field of it, {name}.{first}")
    return name


def parse_values(name: str, text: str) -> tuple | Interval:
    """The values of one axis, of the setting's type."""
    numeric = bool({int, float, Limit} & set(options(hint_of(name))))
    if numeric and (match := re.fullmatch(r"([a-z]\w*)\((.*)\)", text)):
        return parse_interval(name, *match.groups())
    values: list = []
    for part in map(str.strip, split_outside(text, ",")):
        match = re.fullmatch(r"(-?\d+)\s*:\s*(-?\d+)", part) if numeric else None
        more = parse_range(name, *match.groups()) if match else [parse_value(name, part)]
        if twice := [value for value in more if value in values]:
            raise ValueError(f"--grid: {name} has {twice[0]!r} twice")
        values += more
    return tuple(values)


def parse_range(name: str, first: str, end: str) -> list:
    """FIRST:END as the values of a setting."""
    if not 0 < int(end) - int(first) <= MOST_POINTS:
        rule = f"FIRST:END with 1 to {MOST_POINTS:,} whole numbers from FIRST to END - 1"
        raise ValueError(f"--grid: {name} must be {rule}, got {first}:{end}")
    return [convert(hint_of(name), x, name) for x in range(int(first), int(end))]


def parse_interval(name: str, kind: str, inside: str) -> Interval:
    """log(low,high) or uniform(low,high)."""
    low, comma, high = inside.partition(",")
    if kind not in ("log", "uniform") or not comma:
        rule = "log(a,b) or uniform(a,b)"
        raise ValueError(f"--grid: {name} must be {rule}, got {kind}({inside})")
    ends = [parse_value(name, end.strip()) for end in (low, high)]
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        raise ValueError(f"--grid: {name} needs two finite numbers, got {kind}({inside})")
    least = "0 < a < b" if kind == "log" else "a < b"
    if not ends[0] < ends[1] or (kind == "log" and ends[0] <= 0):
        raise ValueError(f"--grid: {name} must be {kind}(a,b) with {least}, got ({inside})")
    return Interval(*ends, log=kind == "log", whole=all(type(end) is int for end in ends))


def parse_value(name: str, text: str) -> Any:
    """A text as a value of a setting, as the flag --config.NAME reads it.

    >>> parse_value("ppo.stop_tokens", "('a','b')"), parse_value("ppo.kl_coef", "1")
    (('a', 'b'), 1.0)
    """
    hint = hint_of(name)
    allowed = options(hint)
    if text[:1] in ("'", '"', "(", "["):
        try:
            return convert(hint, ast.literal_eval(text), name)
        except (SyntaxError, ValueError) as error:
            if isinstance(error, ValueError) and str(error).startswith(name):
                raise
            raise ValueError(f"--grid: {name} cannot be {text}, which is not Python") from error
    for option in allowed:
        try:
            return convert(hint, read_as(option, text), name)
        except NotOfThisType:
            continue
    words = " or ".join(WORDS[option] for option in allowed)
    example = ", as ('a','b') for instance" if {TEXTS, NUMBERS} & set(allowed) else ""
    raise ValueError(f"{name} must be {words}{example}, got {text!r}")


class NotOfThisType(Exception):
    """A text is no value of a type."""


def read_as(option: Any, text: str) -> Any:
    """A text as a value of one type."""
    if option is types.NoneType and text == "None":
        return None
    if option is bool and text.lower() in BOOLEANS:
        return text.lower() in ("true", "t", "1")
    if option in (str, Dtype):
        return text
    if option in (int, float, Limit):
        try:
            return int(text) if option is int else float(text)
        except ValueError:
            pass
    raise NotOfThisType


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text, but not within quotes or brackets.

    >>> split_outside("a,('b','c'),d", ",")
    ['a', "('b','c')", 'd']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([") - (character in ")]")
        if character == separator and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if quote or depth:
        raise ValueError(f"--grid has a quote or a bracket without its other half: {text!r}")
    return parts


def grid_points(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values; the last axis changes fastest.

    Raises:
        ValueError: one is an interval, or there are too many.
    """
    for axis in axes:
        if isinstance(axis.values, Interval):
            name = f"{axis.name} is {'log' if axis.values.log else 'uniform'}(...)"
            raise ValueError(f"--grid: {name}, which --random=N or --optimize draws from")
    if (count := math.prod(len(axis.values) for axis in axes)) > MOST_POINTS:
        raise ValueError(f"a sweep has at most {MOST_POINTS:,} points, got {count:,}")
    names = [axis.name for axis in axes]
    products = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(names, values, strict=True)) for values in products]


def random_points(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """Points drawn from the axes: of an interval any number, of a list any of its values.

    More points begin with those of fewer. No point comes twice.

    Raises:
        ValueError: `count` is none, or the axes have fewer points.
    """
    if not 0 < count <= MOST_POINTS:
        raise ValueError(f"--random must be in [1, {MOST_POINTS:,}], got {count}")
    generator, points = np.random.default_rng(seed), {}
    for _ in range(100 * count):
        point = {axis.name: draw(axis, generator) for axis in axes}
        points.setdefault(point_name(point), point)
        if len(points) == count:
            return list(points.values())
    raise ValueError(f"--random must be at most the points of --grid, {len(points)}, got {count}")


def draw(axis: Axis, generator: np.random.Generator) -> Any:
    """A value of an axis."""
    if isinstance(axis.values, Interval):
        return axis.values.draw(generator)
    return axis.values[generator.integers(len(axis.values))]


def listed_points(points: Any, source: str) -> list[Point]:
    """The points that a config file lists, checked.

    Args:
        points: what its `sweep()` returned.
        source: what to call it.

    Raises:
        ValueError: it is no iterable of points, has none, or a name or a value is wrong.
    """
    if isinstance(points, Mapping | str) or not isinstance(points, Iterable):
        raise ValueError(f"{source} must give points, {{name: value}} each, got {points!r}")
    found = []
    for number, point in enumerate(itertools.islice(points, MOST_POINTS + 1), 1):
        place = f"{source}, point {number}"
        if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
            raise ValueError(f"{place} must be {{name: value}}, got {point!r}")
        try:
            named = {checked_name(name): value for name, value in point.items()}
            found.append({name: converted(name, value) for name, value in named.items()})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not 0 < len(found) <= MOST_POINTS:
        got = "none" if not found else "more"
        raise ValueError(f"{source} must give 1 to {MOST_POINTS:,} points, got {got}")
    return found


def converted(name: str, value: Any) -> Any:
    """A value of a point as its setting has it; NumPy's numbers are numbers."""
    return convert(hint_of(name), value.item() if isinstance(value, np.generic) else value, name)


def apply_point(settings: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A config, nested dicts, with the values of a point.

    Raises:
        ValueError: the config lacks the section of a setting.
    """
    changed = copy.deepcopy(dict(settings))
    for name, value in point.items():
        *sections, field = name.split(".")
        place = changed
        for section in sections:
            place = place.get(section)
            if place is None:
                raise ValueError(f"{name} cannot be set: the config has no section {section}")
        place[field] = value
    return changed


def point_name(point: Point) -> str:
    """The folder of a point: what it changes, in the order of the names, seeds last.

    It depends on the point alone, so that more points change none. All letters are lower case, or
    there is a hash at the end; so it is where the name is too long.

    >>> point_name({"seed": 1, "ppo.kl_coef": 0.05, "ppo.optimizer.learning_rate": 1e-5})
    'kl_coef=0.05,optimizer.learning_rate=1e-05,seed=1'
    >>> point_name({"ppo.init_from": "runs/a/sft"})
    'init_from=runs-a-sft-9a23b8a3'
    """
    names = sorted(point, key=lambda name: (name.split(".")[-1] == "seed", name))
    text = ",".join(f"{short_name(name)}={spelt(point[name])}" for name in names) or "base"
    safe = re.sub(r"[^a-z0-9=,._+-]+", "-", text.lower())
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9]}-{digest}"


def short_name(name: str) -> str:
    """A setting without its section ppo, which most sweeps are about; `ppo.seed` keeps it."""
    return name if name == "ppo.seed" else name.removeprefix("ppo.")


def spelt(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "+".join(map(spelt, value)) if isinstance(value, tuple) else str(value)
