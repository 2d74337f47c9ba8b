"""What is written about settings, metrics, files, formats and commands is true, and is all."""

import ast
import builtins
import dataclasses
import errno
import importlib.util
import json
import os
import re
import shlex
import tomllib
from unittest import mock

import pytest

import ppo_jax
from ppo_jax import cli
from ppo_jax.config import run as settings_module
from ppo_jax.config.parsing import hints_of, options
from ppo_jax.config.run import Config, from_config_dict
from ppo_jax.data import preferences
from ppo_jax.data import records as data
from ppo_jax.data.records import write_jsonl
from ppo_jax.distributed import processes
from ppo_jax.io.metric_names import with_new_names
from ppo_jax.pipeline import run as pipeline
from tests.config.test_run import SECTIONS
from tests.support import chats, tiny_run
from tests.support.command_line import ROOT, run_script
from tests.support.documents import DOCS, EVERYTHING, PAGES, section, table

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


# --- settings -------------------------------------------------------------------------------------

UNITS = "token text step layer block width number part comparison pass prompt response rollout"
UNITS += " iteration"


def load_script(path):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_script(DOCS / "hooks" / "configuration.py")
comments = reference.comments  # {(class, field): its comment}


def test_the_configuration_page_is_what_the_settings_say():
    written = "write it again: python docs/hooks/configuration.py"
    assert PAGES["configuration.md"] == reference.reference(), written


def test_every_setting_is_on_the_configuration_page_with_a_meaning():
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", PAGES["configuration.md"], re.MULTILINE)
    assert {name for name, _ in rows} >= {field.name for _, field in fields()}
    assert [name for name, meaning in rows if not meaning.strip()] == []


def fields():
    return [(cls, field) for cls in SECTIONS for field in dataclasses.fields(cls)]


def test_every_count_has_its_unit():
    """A whole number is a number of something, and its comment says of what."""
    found = comments()
    assert not [
        f"{cls.__name__}.{field.name}: {found[cls.__name__, field.name]}"
        for cls, field in fields()
        if field.name != "seed"
        and int in options(hints_of(cls)[field.name])
        and not re.search("|".join(UNITS.split()), found[cls.__name__, field.name])
    ]


def choices():
    """(class, field, what `Check.choice` allows) of every word that is one of several."""
    seen = []

    def record(check, field, *allowed):
        seen.append((type(check.settings), field, allowed))

    with mock.patch.object(settings_module.Check, "choice", record):
        from_config_dict(tiny_run.config())
    return seen


def test_every_choice_is_named_in_the_comment():
    found = comments()
    assert len(choices()) > 8
    for cls, field, allowed in choices():
        default = next(f.default for f in dataclasses.fields(cls) if f.name == field)
        comment = found[cls.__name__, field]
        missing = [x for x in allowed if x not in ("", default) and f'"{x}"' not in comment]
        assert not missing, f"{cls.__name__}.{field} says nothing of {missing}"


def test_every_setting_that_the_pages_name_exists():
    names = set(re.findall(r"--config\.([a-z_0-9.]+?)=", EVERYTHING))
    names |= set(
        re.findall(r"`((?:model|sft|reward|ppo|evaluate)\.[a-z_.]+)(?:=[^`]*)?`", EVERYTHING)
    )
    assert {"ppo.kl_coef", "model.vocabulary_data"} <= names
    files = {name for name in names if name.endswith(".json")}
    unknown = [name for name in names - files if not is_setting(Config, name.split("."))]
    assert not unknown


def is_setting(cls, path):
    hints = hints_of(cls)
    if path[0] not in hints or len(path) == 1:
        return path[0] in hints
    inner = next((o for o in options(hints[path[0]]) if dataclasses.is_dataclass(o)), None)
    return inner is not None and is_setting(inner, path[1:])


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A complete run of every stage; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder)
    return folder


def documented_metrics():
    """The names in the table, with what its remarks add: "also `sft/`", "`_margin1`, `_margin2`";
    and those of a setting or a model that the run has not: "with `setting=...`:"."""
    names, optional = set(), set()
    for cell, meaning in table(PAGES["metrics.md"]):
        row = re.findall(r"`([^`]+)`", cell)
        if meaning.startswith("of a policy with experts"):
            optional |= set(row)
            continue
        if setting := re.match(r"with `(\w+)", meaning):
            assert setting[1] in {field.name for _, field in fields()}
            optional |= set(row)
            continue
        names |= set(row)
        for remark in re.findall(r"`([^`]+)`", meaning):
            if remark.endswith("/"):
                names |= {remark + name.partition("/")[2] for name in row}
            elif remark.startswith("_"):
                names |= {name + remark for name in row}
    return names, optional


def test_the_table_of_metrics_is_what_a_run_writes(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in with_new_names(json.loads(line))} - {
        "stage",
        "step",
    }
    documented, optional = documented_metrics()
    assert written - documented == set(), "not in the table of docs/metrics.md"
    documented -= {"reward/NAME"}  # with functions
    assert documented - written == set(), "in the table of docs/metrics.md, and nothing writes it"
    sources = "".join(path.read_text() for path in (ROOT / "ppo_jax").rglob("*.py"))
    assert all(f'"{name}"' in sources for name in optional)


def test_the_table_of_files_is_what_a_run_leaves(workdir):
    cells = " ".join(row[0] for row in table(section(PAGES["training.md"], "## Files of a run")))
    named = {name.strip("/") for name in re.findall(r"`([^`]+)`", cells)}
    found = {path.name for path in workdir.iterdir()}
    assert found - {"tensorboard"} == named  # which its row on metrics.jsonl names
    inside = {path.name for path in (workdir / "sft").iterdir()}
    assert inside == {"stage.json", "tokenizer", "frozen", "checkpoints"}


# --- formats of data ------------------------------------------------------------------------------

READ = {
    "SFT": [data.load_texts],
    "reward model": [preferences.load_preferences, lambda path, _: data.load_ratings(path)],
    "PPO": [data.load_prompts],
}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
VALUES = {"messages": MESSAGES, "responses": ["good", "bad"], "scores": [2, 1]}
VALUES |= {"ratings": [1, 2.5], "rating": 3, "margin": 0.5}
TALKS = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


def documented_schemas():
    """(for what, its keys) of each schema in the table of docs/data.md."""
    rows = table(section(PAGES["data.md"], "## Data"))
    found = [(row[0], keys) for row in rows for keys in re.findall(r"`(\{.*?\})`", row[1])]
    return [(what, tuple(re.findall(r'"(\w+)":', keys))) for what, keys in found]


def example_of(keys):
    """A row with these keys; two conversations have the prompt in them."""
    if "chosen" in keys and "prompt" not in keys:
        return {key: VALUES.get(key) for key in keys} | TALKS
    return {key: VALUES.get(key, f"some {key}") for key in keys}


@pytest.mark.parametrize(("what", "keys"), documented_schemas(), ids=str)
def test_every_schema_in_the_docs_is_read(tmp_path, what, keys):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [example_of(keys)])
    read = []
    for load in READ[what]:
        try:
            read += load(path, chats.TOKENIZER)
        except ValueError as error:
            assert "the keys must be" in str(error)
    assert len(read) == 1


def test_every_schema_that_is_read_is_in_the_docs():
    schemas = (data.DEMONSTRATION_SCHEMAS, data.RATING_SCHEMAS, data.PROMPT_SCHEMAS)
    read = {keys for group in (*schemas, preferences.PREFERENCE_SCHEMAS) for keys in group}
    assert read == {keys for _, keys in documented_schemas()}


# --- commands -------------------------------------------------------------------------------------


def commands():
    """Every `python experiments/...` of the documents and of the docstrings, on one line."""
    sources = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    sources += sorted((ROOT / "configs").glob("*.py")) + sorted((ROOT / "experiments").glob("*.py"))
    for source in sources:
        text = source.read_text().replace("\\\n", " ")
        for command in re.findall(r"python (experiments/[^`|\n]*)", text):
            yield pytest.param(command, id=f"{source.name}: {command.split(' --workdir')[0]}")


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_parses(command, monkeypatch):
    """Its flags exist, its config is one, and its settings are allowed; nothing is run."""
    monkeypatch.chdir(ROOT)
    path, *flags = shlex.split(re.sub(r"=N\b", "=1", command), comments=True)
    given, script = [], path.removeprefix("experiments/").removesuffix(".py")

    def start(config, workdir, only):
        given.append(from_config_dict(config))

    if script in ("rlhf", "train_sft", "train_reward", "train_ppo"):
        patch = mock.patch.multiple(pipeline, run=start, dry_run=start)
    else:
        patch = mock.patch.object(cli, "call", given.append)
    with patch, mock.patch.object(processes, "initialize"):
        ended = run_script(script, *flags)
    assert (ended.code, ended.err) == (0, "") and len(given) == 1


def test_every_script_tells_its_command():
    for path in (ROOT / "experiments").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            assert f"python experiments/{path.name} " in path.read_text(), path.name


def test_every_config_file_tells_its_command():
    for path in (ROOT / "configs").glob("*.py"):
        assert f"--config=configs/{path.name}" in path.read_text(), path.name


# --- messages -------------------------------------------------------------------------------------

# What the system and your own code say of themselves.
OF_OTHERS = set(dir(builtins)) | {"nan"}
OF_OTHERS |= set(" ".join(map(os.strerror, (errno.ENOSPC, errno.EMFILE))).split())


def texts_of_the_library():
    """The texts of its source but docstrings, each as its fixed parts, around the values."""
    for path in (ROOT / "ppo_jax").rglob("*.py"):
        todo = [ast.parse(path.read_text())]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.JoinedStr):
                values = [x.value if isinstance(x, ast.Constant) else "{}" for x in node.values]
                yield "".join(values).split("{}")
                todo += [x.value for x in node.values if isinstance(x, ast.FormattedValue)]
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.split("{}")
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            todo += [] if is_docstring else ast.iter_child_nodes(node)


def words_of(text):
    """All but quotations, paths, numbers and names of settings."""
    text = re.sub(r"(?<!\w)'[^']*'|\[[^]]*\]|\S*[\d_/@=]\S*|\S+\.\S+", " ", text)
    return set(re.findall(r"[A-Za-z]{3,}", text))


def known_words(message, texts):
    """Those of the texts that a message has in it, or ends within, with "..."."""
    last = message.rstrip(". ")[-25:] if message.endswith("...") else None
    for pattern, parts in texts:
        if pattern.search(message) or (last and any(last in part for part in parts)):
            yield from re.findall(r"[A-Za-z]+", " ".join(parts))


def test_every_quoted_message_is_of_the_library():
    """Each of its words stands in a text of the source that the message has as a whole."""
    quoted = re.findall(r"^\| `([^`]+)` \|", PAGES["errors.md"], re.MULTILINE)
    texts = [
        (re.compile(".*?".join(map(re.escape, parts))), parts)
        for parts in texts_of_the_library()
        if len("".join(parts)) > 2
    ]
    unknown = {x: words_of(x) - set(known_words(x, texts)) - OF_OTHERS for x in quoted}
    assert len(quoted) > 50 and not {x: words for x, words in unknown.items() if words}


# --- the rest -------------------------------------------------------------------------------------


def test_contributing_is_three_commands_that_the_project_knows():
    block = re.search(r"```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1].splitlines()
    install, test, lint = block
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert re.search(r"'\.\[(\w+)\]'", install)[1] in extras
    assert test == "pytest" and lint == "ruff check . && ruff format --check ."


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ppo_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changelog or f"## {ppo_jax.__version__}" in changelog


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("package", ["core", "rollout", "algorithms", "models"])
def test_every_pure_module_is_on_its_page_of_the_api(package):
    # Nothing in them is for users.
    inner = {"core.renamed", "core.cpu", "core.grouped", "core.lanes"}
    folder = ROOT / "ppo_jax" / package
    modules = {f"{package}.{path.stem}" for path in folder.glob("*.py")} - {f"{package}.__init__"}
    shown = set(re.findall(r"^::: ppo_jax\.([\w.]+)$", PAGES[f"api/{package}.md"], re.MULTILINE))
    assert shown == modules - inner


def pages_of_the_site(nav):
    """The pages that the navigation of mkdocs.yml names."""
    return set(re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE))


def test_every_page_is_in_the_navigation_of_the_site():
    nav = pages_of_the_site((ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    others = {"index.md", "repository/CONTRIBUTING.md", "repository/CHANGELOG.md"}  # from the root
    assert nav - others == set(PAGES)


def links():
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                yield path, target


def test_every_link_between_the_pages_leads_to_a_file():
    broken = [
        f"{path.name}: {target}" for path, target in links() if not (path.parent / target).exists()
    ]
    assert len(list(links())) > 10 and not broken


def test_every_page_is_reached_from_the_front_page():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        new = {
            (path.parent / target).resolve() for path, target in links() if path == page
        } - reached
        reached |= new
        todo += new
    assert {path for path in (ROOT / "docs").rglob("*.md")} <= reached
