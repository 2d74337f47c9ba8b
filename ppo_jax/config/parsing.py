"""From nested dictionaries to frozen dataclasses: every value of its type, every error named.

A field's hint is str, int, float, bool, `Limit`, `Dtype`, tuple[str, ...], tuple[float, ...],
another dataclass (a section), `str | int`, or one of these with None.
"""

import dataclasses
import difflib
import importlib
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar

from ppo_jax.models.config import dtype_name

Limit = Annotated[float, "may be inf"]  # a float for which inf is no limit
Dtype = Annotated[str, "a dtype"]  # its name; or as JAX has it, jnp.bfloat16
TEXTS = tuple[str, ...]
NUMBERS = tuple[float, ...]

WORDS = {
    str: "a text",
    Dtype: "the name of a dtype",
    int: "a whole number",
    float: "a number",
    Limit: "a number (or inf)",
    bool: "True or False",
    TEXTS: "a list of texts",
    NUMBERS: "a list of numbers",
    types.NoneType: "None",
}
# What the devices count and compute with: int32 and float32. A seed is cut for each use.
LARGEST_INT, LARGEST_SEED, LARGEST_FLOAT = 2**31 - 1, 2**63 - 2, 3.4e38
RULES = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in (0, 1)": lambda x: 0 < x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}


class Check:
    """The rules of one section. One that is broken gives a ValueError with field, rule and value.

    Args:
        settings: the section.
        section: its name, "ppo.optimizer" for instance; "" is the whole config.
    """

    def __init__(self, settings: Any, section: str):
        self.settings, self.prefix = settings, section and f"{section}."

    def that(self, holds: bool, field: str, rule: str):
        """`rule` says in words what must hold for the field."""
        if not holds:
            got = getattr(self.settings, field)
            if dataclasses.is_dataclass(got):  # a section: what of it is given
                got = {k: x for k, x in vars(got).items() if x != getattr(type(got), k, None)}
            raise ValueError(f"{self.prefix}{field} must be {rule}, got {got!r}")

    def each(self, rule: str, *fields: str):
        """Every one of the fields keeps a rule of `RULES`."""
        for field in fields:
            self.that(RULES[rule](getattr(self.settings, field)), field, rule)

    def choice(self, field: str, *choices: Any):
        self.that(getattr(self.settings, field) in choices, field, f"one of {list(choices)}")

    def multiple(self, field: str, divisor: int, words: str):
        """`words` say what the divisor is."""
        holds = getattr(self.settings, field) % divisor == 0
        self.that(holds, field, f"a multiple of {words} ({divisor})")


def options(hint: Any) -> tuple:
    """The types that a hint allows."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def hints_of(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not ClassVar}


def changeable(default: Any = dataclasses.MISSING) -> Any:
    """A field that a resumed run may change: neither the shapes of the state nor the order of the
    data depend on it."""
    return dataclasses.field(default=default, metadata={"changeable": True})


def changeable_fields(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of the `changeable` fields of a section, those of its own sections included."""
    names = {f"{prefix}{x.name}" for x in dataclasses.fields(cls) if "changeable" in x.metadata}
    for name, hint in hints_of(cls).items():
        for section in filter(dataclasses.is_dataclass, options(hint)):
            names |= changeable_fields(section, f"{prefix}{name}.")
    return names


def with_new_names(
    cls: type, values: Mapping[str, Any], section: str = "", *, warn: bool = True
) -> dict[str, Any]:
    """The values of a section with each field under its name of today.

    A class may have `FORMERLY`, {old name: new name}: the old one is taken for one release. The
    new one may be there too as long as it has its default, see `filled_in`.

    Raises:
        ValueError: a field is given under both names.
    """
    formerly, values = getattr(cls, "FORMERLY", {}), dict(values)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for old in formerly.keys() & values.keys():
        new = formerly[old]
        if values.get(new, defaults[new]) != defaults[new]:
            raise ValueError(f"{section}{old} is now {section}{new}, got both")
        if warn:
            warn_renamed(f"{section}{old}", f"{section}{new}")
        values[new] = values.pop(old)
    return values


def warn_renamed(old: str, new: str):
    message = f"the setting {old} is now {new}; the old name goes with the next release"
    warnings.warn(message, FutureWarning, stacklevel=2)


def filled_in(cls: type, values: dict, section: str = "") -> dict:
    """The values with the defaults of the fields that are not among them, section by section.

    Meant for a dictionary that keeps the type of each of its values from then on: an int stands
    as a float where the field is one, and as text where the field is a word or a number, so that
    a later value may be 0.5 after 1, or "all" after 4. Nothing is checked.
    """
    hints, values = hints_of(cls), with_new_names(cls, values, section)
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    defaults = {k: v for k, v in fields.items() if v is not dataclasses.MISSING}
    sections = {k: v for k, v in defaults.items() if dataclasses.is_dataclass(v)}
    defaults |= {k: dataclasses.asdict(v) for k, v in sections.items()}
    filled = defaults | values
    return {k: widened(hints.get(k), v, f"{section}{k}.") for k, v in filled.items()}


def widened(hint: Any, value: Any, section: str) -> Any:
    """One value of `filled_in`."""
    allowed = options(hint)
    if isinstance(value, dict):
        cls = next((o for o in allowed if dataclasses.is_dataclass(o)), None)
        return filled_in(cls, value, section) if cls else value
    if Dtype in allowed:
        return dtype_name(value)
    if type(value) is int and (float in allowed or Limit in allowed):
        return float(value)
    return str(value) if type(value) is int and str in allowed else value


def build(cls: type, values: Any, section: str = "") -> Any:
    """One dataclass from a dictionary of its fields.

    Args:
        cls: a dataclass; its `__post_init__` checks ranges.
        values: {field: value}; a section is a dictionary in its turn.
        section: what comes before the field in messages, with its dot.

    Raises:
        ValueError: a key that does not exist, a value of the wrong type or a missing field, with
            the field, what was given and what is allowed.
    """
    name = section.rstrip(".") or "config"
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a section of settings, got {values!r}")
    hints, values = hints_of(cls), with_new_names(cls, values, section)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(unknown_setting(section, unknown[0], fields))
    for field in fields.values():
        no_default = field.default is dataclasses.MISSING
        if no_default and field.name not in values:
            raise ValueError(f"{section}{field.name} must be given")
    return cls(**{k: convert(hints[k], v, f"{section}{k}") for k, v in values.items()})


def unknown_setting(section: str, name: str, known: Collection[str]) -> str:
    """What to say of a name that is none of the settings of a section.

    >>> unknown_setting("ppo.", "kl_coeff", ["kl_coef", "seed"])
    "unknown setting ppo.kl_coeff; did you mean 'ppo.kl_coef'?"
    >>> unknown_setting("ppo.", "beta", ["kl_coef", "seed"])
    "unknown setting ppo.beta; known: ['kl_coef', 'seed']"
    """
    lower = {x.lower(): x for x in known}
    near = [lower[x] for x in difflib.get_close_matches(name.lower(), lower, n=1)]
    rest = f"did you mean {section + near[0]!r}?" if near else f"known: {sorted(known)}"
    return f"unknown setting {section}{name}; {rest}"


def convert(hint: Any, value: Any, field: str) -> Any:
    """A value as the type of its field, or a ValueError that names the field."""
    allowed = options(hint)
    if value is None and types.NoneType in allowed:
        return None
    if set(allowed) == {str, int} and isinstance(value, str) and value.isdecimal():
        return int(value)  # see `filled_in`
    for option in allowed:
        if dataclasses.is_dataclass(option):
            return build(option, value, field + ".")
        if option == TEXTS:
            if isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
                return tuple(value)
        elif option == NUMBERS:
            if isinstance(value, list | tuple):
                return tuple(convert(float, x, f"{field}[{i}]") for i, x in enumerate(value))
        elif option in (float, Limit):
            if isinstance(value, int | float) and not isinstance(value, bool):
                infinite = isinstance(value, float) and not math.isfinite(value)
                finite = not infinite or (option == Limit and value == math.inf)
                if not finite:
                    raise ValueError(f"{field} must be a finite number, got {value!r}")
                return float(in_range(value, field, LARGEST_FLOAT))
            if option == Limit and value == "inf":  # as config.json has it
                return math.inf
        elif option is int and type(value) is int:
            return in_range(value, field, LARGEST_SEED if field == "seed" else LARGEST_INT)
        elif option == Dtype:
            if isinstance(name := dtype_name(value), str):
                return name
        elif type(value) is option:
            if option is str and "\0" in value:  # no path has one
                raise ValueError(f"{field} must not have a zero byte, got {value!r}")
            return value
    words = " or ".join(WORDS[option] for option in allowed)
    raise ValueError(f"{field} must be {words}, got {value!r}")


def in_range(value: float, field: str, largest: float) -> float:
    """A finite number as it is, or Limit's inf, if it is not too large."""
    if abs(value) > largest and value != math.inf:
        got = f"{value}" if abs(value) < 1e39 or isinstance(value, float) else "one far beyond it"
        raise ValueError(f"{field} must be at most {largest:,}, got {got}")
    return value


class FunctionFailed(RuntimeError):
    """A function of the user's took too long, or raised an error: the cause of this one."""


def failure(function: str, error: BaseException) -> FunctionFailed:
    """What to raise from an error inside of a function of the user's."""
    return FunctionFailed(f"{function} raised {describe_error(error)}")


LONGEST = 300  # characters of an error that is told inside of another


def describe_error(error: BaseException) -> str:
    """Kind and text of an error on one line, whose class may be a user's or a library's."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be printed)"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"{type(error).__name__}: {text}".rstrip(": ")


def load_function(name: str, field: str) -> Callable:
    """The function that "module:function" names; modules of the current folder are found.

    Raises:
        ValueError: there is no such module or function.
        FunctionFailed: the module raised something else, be it SystemExit.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if module_name.startswith("."):
            raise ValueError("the name of the module must not begin with a dot")
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        where = ""
        if isinstance(error, ModuleNotFoundError) and not hint(name):
            where = ", neither in the current folder nor in one of PYTHONPATH"
        message = f"{field} must be 'module:function', got {name!r}: {error}{where}{hint(name)}"
        raise ValueError(message) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise failure(f"the module of {field} {name}", error) from error
    if not callable(function):
        raise ValueError(f"{field} must name a function, got {name!r}, which is {function!r}")
    return function


def hint(name: str) -> str:
    """How to write what looks like a file, or has a dot for the colon; "" for anything else.

    >>> hint("rewards/mine.py:score")
    '; write it as module:function, e.g. rewards.mine:score'
    >>> hint("mine.score")
    '; write it as module:function, e.g. mine:score'
    >>> hint("mine:score")
    ''
    """
    module, _, function = name.partition(":")
    if not function and not name.endswith(".py"):
        module, _, function = name.rpartition(".")
    module = module.removesuffix(".py").replace("/", ".").strip(".")
    better = f"{module}:{function or 'score'}"
    return f"; write it as module:function, e.g. {better}" if module and better != name else ""
