"""Each package imports only from those below it, and the pure ones only what computes."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import ppo_jax

ROOT = pathlib.Path(ppo_jax.__file__).parent

# What each package may import of the others, from the bottom to the top.
PACKAGES = {
    "core": [],
    "models": ["core"],
    "rollout": ["core"],
    "algorithms": ["core", "rollout"],
    "config": ["core", "models"],
    "distributed": ["models", "config"],
    "data": ["core", "models", "config", "distributed"],
    "io": ["core", "models", "config", "distributed", "data"],
}
PURE = list(PACKAGES)[:4]
PACKAGES["inference"] = list(PACKAGES)
PACKAGES["training"] = list(PACKAGES)
PACKAGES["evaluation"] = list(PACKAGES)
PACKAGES["pipeline"] = list(PACKAGES)
PACKAGES["planner"] = list(PACKAGES)
PACKAGES["cli"] = list(PACKAGES)
PACKAGES["commands"] = list(PACKAGES)

# The purity line: nothing below it can touch a file, a clock or a device.
COMPUTES = {"jax", "flax", "optax", "chex"}
COMPUTES |= {"collections", "dataclasses", "functools", "inspect", "math", "operator", "re"}
COMPUTES |= {"typing", "warnings"}
# Those that cost a second to load, and that `import ppo_jax` therefore leaves alone.
HEAVY = ["orbax", "transformers", "tokenizers", "torch", "matplotlib", "sklearn", "tensorboardX"]


def modules(*packages):
    """The modules of some packages, or of all, as dotted names below ppo_jax."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    names = [name for name in names if name != "__init__"]
    return [name for name in names if not packages or name.split(".")[0] in packages]


def source(name):
    path = ROOT / name.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def imports(text):
    """(modules of this library, top-level names of the others) that a source imports, anywhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in dotted:
            first, _, rest = path.partition(".")
            ours.add(rest) if first == "ppo_jax" else others.add(first)
    return ours, others


def test_every_package_is_listed():
    found = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.name[0] not in "._"}
    assert {name for name in found if "." not in name} == set(PACKAGES)


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_packages_below_its_own(name):
    package = name.split(".")[0]
    ours, _ = imports(source(name))
    packages = {path.split(".")[0] for path in ours} - {package}
    above = sorted(packages - set(PACKAGES[package]))
    assert not above, f"{name} must not import {above}"


def test_the_modules_import_each_other_in_no_circle():
    names = set(modules())
    needs = {}
    for name in names:
        ours, _ = imports(source(name))
        needs[name] = {path if path in names else path.rpartition(".")[0] for path in ours} - {name}
    while free := {name for name, ours in needs.items() if not ours & set(needs)}:
        needs = {name: ours for name, ours in needs.items() if name not in free}
    assert not needs


@pytest.mark.parametrize("name", modules(*PURE))
def test_a_pure_module_imports_only_what_computes(name):
    _, others = imports(source(name))
    assert others <= COMPUTES, f"{name} is below the purity line"


@pytest.mark.parametrize("name", modules(*PURE))
def test_a_pure_module_opens_no_file_and_prints_nothing(name):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(source(name)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


def test_only_the_module_that_is_named_for_it_knows_a_third_party():
    """What may change under us is behind one file each."""
    homes = {
        "orbax": {"io.checkpoints"},
        "tensorboardX": {"training.writers"},
        "wandb": {"training.writers"},
        "trackio": {"training.writers"},
        "tqdm": {"training.metrics", "pipeline.sweep"},
        "pyarrow": {"data.readers"},
        "datasets": {"data.readers"},
        "jinja2": {"data.templates", "evaluation.report.report"},
        "matplotlib": {
            "evaluation.report.plots",
            "evaluation.report.sweep_plots",
            "evaluation.report.frontier_plots",
            "evaluation.report.critic_plots",
        },
        "scipy": {"evaluation.sweep_table"},
        "gguf": {"io.gguf.header"},
        "tokenizers": {"io.gguf.tokenizer", "io.tokenizers"},
        "transformers": {"io.gguf.tokenizer", "io.tokenizers"},
        "ml_collections": {"config.run", "pipeline.run", "cli"},
    }
    users = {name: imports(source(name))[1] for name in modules()}
    for package, home in homes.items():
        assert {name for name, others in users.items() if package in others} <= home, package


def test_the_shell_is_no_part_of_what_an_import_gives():
    ours, others = imports((ROOT / "__init__.py").read_text())
    assert {path.split(".")[0] for path in ours} <= set(PURE) and others == {"importlib"}


def test_importing_the_core_loads_nothing_heavy():
    code = f"import sys, ppo_jax; print([x for x in {HEAVY!r} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_function_of_the_shell_is_loaded_when_it_is_asked_for():
    for name in ppo_jax.SHELL:
        loaded = getattr(ppo_jax, name)
        assert inspect.isfunction(loaded) or (name == "hf" and inspect.ismodule(loaded))
        assert name in dir(ppo_jax)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ppo_jax.nonsense  # noqa: B018


def test_the_public_names_are_sorted_and_each_is_there():
    assert list(ppo_jax.__all__) == sorted(set(ppo_jax.__all__))
    assert all(hasattr(ppo_jax, name) for name in ppo_jax.__all__)


@pytest.mark.parametrize("name", ppo_jax.__all__)
def test_every_public_name_is_documented(name):
    text = vars(getattr(ppo_jax, name)).get("__doc__") or getattr(ppo_jax, name).__doc__
    # A dataclass without a docstring gets its signature for one.
    assert text and text.strip() and not text.startswith(f"{name}(")


@pytest.mark.parametrize("package", ["", *PURE])
def test_what_is_imported_into_a_package_is_public(package):
    """No name slips out: what __init__ imports is in __all__, and the other way round."""
    module = importlib.import_module(f"ppo_jax.{package}".rstrip("."))
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(module.__all__)
    assert list(module.__all__) == sorted(module.__all__)


@pytest.mark.parametrize("name", modules())
def test_every_module_opens_with_what_it_is(name):
    assert ast.get_docstring(ast.parse(source(name)))
