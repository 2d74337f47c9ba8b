"""Writes docs/configuration.md from the settings and their comments.

python docs/hooks/configuration.py

A test compares the page with the settings; the site is built from them.
"""

import dataclasses
import pathlib
import re
import typing
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
SOURCES = [
    ROOT / "ppo_jax" / "config" / name for name in ("run.py", "stages.py", "ppo.py", "mesh.py")
]

HEAD = """# Configuration

Every setting of a config file, with its type, default and unit. Any of them can be set on the
command line: `--config.ppo.kl_coef=0.1`; `--config.evaluate=None` leaves a section out. A value of
the wrong type or outside its range is refused before anything is allocated, and so is a setting
that does not exist. Config files are `ml_collections` files; the ones of `configs/` are lab notes
to start from.

This page is written by `python docs/hooks/configuration.py` from the comments in `ppo_jax/config/`.
"""


def comments() -> dict[tuple[str, str], str]:
    """{(class, field): its comment}, at the end of its line and on lines of their own below it."""
    texts, place, cls = {}, None, None
    for line in "\n".join(path.read_text() for path in SOURCES).splitlines():
        if match := re.match(r"class (\w+)", line):
            cls = match[1]
        if match := re.match(r"    (\w+): [^#]*(?:#(.*))?$", line):
            place = (cls, match[1])
            texts[place] = (match[2] or "").strip()
        elif place and (match := re.match(r"    # (.*)", line)):
            texts[place] += " " + match[1]
        else:
            place = None
    return texts


def sections() -> dict[type, list[str]]:
    """{class of a section: where it is in a config}, in the order of a config."""
    from ppo_jax.config.parsing import hints_of, options
    from ppo_jax.config.run import Config

    places: dict[type, list[str]] = {}

    def visit(cls: type, place: str):
        places.setdefault(cls, []).append(place)
        for name, hint in hints_of(cls).items():
            for option in filter(dataclasses.is_dataclass, options(hint)):
                visit(option, f"{place}.{name}".strip("."))

    visit(Config, "")
    return places


def heading(places: list[str]) -> str:
    return ", ".join(f"`{place}`" for place in places) if places[0] else "The run"


def anchor(places: list[str]) -> str:
    """Of a heading, as Markdown makes it."""
    return re.sub(r"[^\w\- ]", "", heading(places)).strip().lower().replace(" ", "-")


def type_name(hint: typing.Any) -> str:
    """A type as an annotation has it: "str or int" for a union."""
    from ppo_jax.config.parsing import options

    def name(option: typing.Any) -> str:
        if typing.get_origin(option) is tuple:
            return f"tuple of {name(typing.get_args(option)[0])}"
        plain = getattr(option, "__origin__", option)  # of Annotated
        return getattr(plain, "__name__", str(plain))

    return " or ".join(name(option) for option in options(hint) if option is not type(None))


def rows(cls: type, places: dict[type, list[str]]) -> Iterator[str]:
    """A row of the table for every field of a section."""
    from ppo_jax.config.parsing import hints_of, options

    texts, hints = comments(), hints_of(cls)
    for field in dataclasses.fields(cls):
        inherited = (texts.get((owner.__name__, field.name)) for owner in cls.__mro__)
        comment = next(filter(None, inherited), "")
        meaning = re.sub(r'(?<!`)(\{[^}]*\}|"[^"]*")', r"`\1`", comment)
        inner = next(filter(dataclasses.is_dataclass, options(hints[field.name])), None)
        kind, default = type_name(hints[field.name]), f"`{field.default!r}`"
        if inner is not None:
            kind = f"[section](#{anchor(places[inner])})"
            default = "" if dataclasses.is_dataclass(field.default) else default
        if field.default is dataclasses.MISSING:
            default = "required"
        yield f"| `{field.name}` | {kind} | {default} | {meaning} |".replace("|  |", "| |")


def reference() -> str:
    """The page."""
    places, text = sections(), HEAD
    for cls, where in places.items():
        text += f"\n## {heading(where)}\n\n{' '.join(cls.__doc__.split())}\n\n"
        text += "| setting | type | default | meaning |\n|---|---|---|---|\n"
        text += "\n".join(rows(cls, places)) + "\n"
    return text


def on_page_markdown(markdown, page, config, files):
    """The page of the site is never older than the settings."""
    return reference() if page.file.src_uri == PAGE.name else markdown


if __name__ == "__main__":
    PAGE.write_text(reference())
