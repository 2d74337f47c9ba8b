"""A name in backticks is one that the library has: docstrings and comments follow a rename."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

import ppo_jax

ROOT = pathlib.Path(ppo_jax.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
EXTERNAL = {"jvp", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "python"}
FILES = {"py", "json", "jsonl", "html", "md", "safetensors"}


def module_names(path):
    """What a module is called in a docstring: its own name and those of its packages."""
    return set(path.relative_to(ROOT.parent).with_suffix("").parts) - {"__init__"}


def defined(path):
    """The names at the top level of a module."""
    for node in TREES[path].body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        yield from (x.id for x in targets if isinstance(x, ast.Name))
        if hasattr(node, "name"):
            yield node.name


HOMES = {}  # name: what the modules that define it are called
for module in MODULES:
    for defined_name in defined(module):
        HOMES.setdefault(defined_name, {"ppo_jax", "hf"}).update(module_names(module))


def tokens(path):
    return tokenize.generate_tokens(io.StringIO(path.read_text()).readline)


KNOWN = set(HOMES) | EXTERNAL | {name for path in MODULES for name in module_names(path)}
for module in MODULES:
    for token in tokens(module):
        short = token.type == tokenize.STRING and len(token.string) < 60  # "ppo.kl_coef" is a name
        if token.type == tokenize.NAME or short:
            KNOWN.update(re.findall(r"\w+", token.string))


def references(path):
    """(line, reference) of all names in backticks of a module's comments and docstrings."""
    for token in tokens(path):
        text = token.type == tokenize.STRING and '"""' in token.string[:4]
        if text or token.type == tokenize.COMMENT:
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                for name in re.findall(r"`([a-zA-Z_][\w.]*)`", line):
                    yield number, name


def is_stale(reference):
    *owners, name = reference.split(".")
    if name in FILES:
        return False
    if set(reference.split(".")) - KNOWN:
        return True
    return bool(owners) and name in HOMES and owners[-1] not in HOMES[name] | {"jax", "lax"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_backticks_is_there(path):
    stale = [f"{path.name}:{line} {name}" for line, name in references(path) if is_stale(name)]
    assert not stale


def test_a_name_that_is_not_there_is_seen():
    assert is_stale("checks.check_data") and is_stale("sharding.abstract")
    assert not is_stale("Layout.shardings") and not is_stale("stage_folder.resolve")
