"""The flags `--config.a.b=value`, checked by the types of the settings; mistakes in one line.

What ml_collections and absl say of a wrong flag names neither the setting nor what is allowed.
"""

import dataclasses
import os
import re
import traceback
import types
from collections.abc import Sequence
from typing import Any

from ppo_jax.config.parsing import (
    WORDS,
    Limit,
    hints_of,
    options,
    unknown_setting,
    warn_renamed,
)
from ppo_jax.config.run import Config

OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)
FILE = re.compile(r"--?config(?:=(.*))?")
BOOLEANS = ("true", "false", "t", "f", "1", "0")
READ = {int: int, float: float, Limit: float}


def checked_flags(argv: Sequence[str]) -> list[str]:
    """The arguments of a script, with the flags of a config checked and under their names of today.

    Raises:
        ValueError: no config file or one that is not there, a setting that does not exist, or a
            value that is not of its type.
    """
    overrides = [match for match in map(OVERRIDE.fullmatch, argv) if match]
    files = [(i, match) for i, match in enumerate(map(FILE.fullmatch, argv)) if match]
    if overrides and not files:
        raise ValueError(f"--config=FILE.py must be given before --config.{overrides[0][1]}")
    for i, match in files:
        name = match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
        path = name.partition(":")[0]
        if not os.path.isfile(path):
            raise ValueError(f"--config must be a config file, got {path!r}, which is not there")
    return [renamed_flag(argument) for argument in argv]


def renamed_flag(argument: str) -> str:
    """An argument, which is checked if it is a flag of a config."""
    match = OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    name = current_name(match[1])
    check_override(name, match[2])
    return f"--config.{name}" + ("" if match[2] is None else f"={match[2]}")


def current_name(name: str) -> str:
    """The name of a setting, "ppo.slots" for instance, as it is today."""
    section, _, field = name.rpartition(".")
    try:
        cls = section_of(hint_of(section)) if section else Config
    except ValueError:  # there is no such section: the check of the whole name says so
        return name
    new = getattr(cls, "FORMERLY", {}).get(field)
    if new is None:
        return name
    warn_renamed(name, f"{section}.{new}")
    return f"{section}.{new}"


def emptied(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other arguments, the settings that are to be None), of checked ones. ml_collections
    reads no None."""
    matches = ((argument, OVERRIDE.fullmatch(argument)) for argument in argv)
    is_none = {x: m[1] for x, m in matches if m and m[2] == "None" and may_be_none(hint_of(m[1]))}
    return [x for x in argv if x not in is_none], list(is_none.values())


def may_be_none(hint: Any) -> bool:
    return types.NoneType in options(hint)


def check_override(name: str, text: str | None):
    """A text is a value of the setting; None is no text, or one in the next argument."""
    hint = hint_of(name)
    if text == "None" and may_be_none(hint):
        return
    if cls := section_of(hint):
        example = f"--config.{name}.{next(iter(hints_of(cls)))}=..."
        none = f" (or left out, --config.{name}=None)" if may_be_none(hint) else ""
        raise ValueError(f"{name} must be set field by field, {example}{none}, got {text!r}")
    if text is not None and not any(is_text_of(option, text) for option in options(hint)):
        words = " or ".join(WORDS[option] for option in options(hint))
        raise ValueError(f"{name} must be {words}, got {text!r}")


def hint_of(name: str) -> Any:
    """The type of a setting, of "ppo.kl_coef" for instance."""
    hint, before = Config, ""
    for part in name.split("."):
        cls = section_of(hint)
        if cls is None:
            raise ValueError(f"{before[:-1]} is a setting and has no fields, got {name}")
        hints = hints_of(cls)
        if part not in hints:
            raise ValueError(unknown_setting(before, part, hints))
        hint, before = hints[part], f"{before}{part}."
    return hint


def section_of(hint: Any) -> type | None:
    """The dataclass among the types of a setting."""
    return next((option for option in options(hint) if dataclasses.is_dataclass(option)), None)


def is_text_of(option: Any, text: str) -> bool:
    """Whether a text can be read as a type."""
    if option is bool:
        return text.lower() in BOOLEANS
    if option is types.NoneType:
        return text == "None"
    try:
        READ.get(option, str)(text)
    except ValueError:
        return False
    return True


def explain(error: Exception) -> str:
    """What went wrong while flags and the config file were read, in one line.

    A config file is Python: the message has the file and the line of its error.
    """
    text = str(error.args[0] if error.args else error).removeprefix("ERROR:: ")  # of absl
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    if match := re.match(r'Override (\S+) can not be applied because field "(\w+)" is None', text):
        return f"{match[1]} cannot be set: the config has no section {match[2]}"
    if match := re.match(r"flag --(\w+)=None: Flag --\1 must have a value", text):
        return f"--{match[1]} is missing"
    if "no attribute 'get_config'" in text:
        return "the config file must have a function get_config"
    if "get_config() takes" in text:
        return "this config file has no variants: leave out the colon and what follows it"
    if "Traceback" in text:  # ml_collections puts that of a config file into the message
        kind, _, text = text.strip().splitlines()[-1].partition(": ")
        return text if kind == "ValueError" else f"the config file gives a {kind}: {text}"
    if isinstance(error, NameError | ImportError):
        frames = traceback.extract_tb(error.__traceback__)
        place = next(f for f in reversed(frames) if not f.filename.startswith("<frozen"))
        return f"{place.filename}:{place.lineno}: {text}"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
