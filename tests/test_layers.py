"""Each module imports only from rows below its own, and the core only what computes."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import ppo_jax

PACKAGE = pathlib.Path(ppo_jax.__file__).parent

# From the bottom to the top: a module imports only from rows before its own.
CORE = [
    ["structs", "masking", "distributions", "kl", "shapes", "axes", "linear"],
    ["attention", "sampling", "chunks", "lora"],
    ["attention_kernels", "modules"],
    ["transformer"],
    ["networks"],
    ["advantages", "rewards", "losses", "optimizer", "partition", "slots", "packed_rows"],
    ["rollout"],
    ["steps", "experience"],
    ["ppo"],
]
SHELL = [
    [
        "formats",
        "pairs",
        "gguf_file",
        "families",
        "plugins",
        "typed",
        "workdir",
        "checksums",
        "leaves",
        "compilation",
        "host_memory",
        "processes",
        "hlo",
        "flops",
        "report_panels",
        "report_page",
        "plot_labels",
    ],
    ["chat", "sharding", "step_folders", "setting_rules", "hlo_loops", "hlo_work", "published"],
    ["data", "preferences", "token_rows", "hlo_traffic", "reward_functions", "stage_settings"],
    [
        "judges",
        "config",
        "checkpoints",
        "metrics",
        "sources",
        "batches",
        "hf_tensors",
        "report_summary",
        "plots",
        "programs",
    ],
    [
        "vocabulary",
        "hf",
        "inputs",
        "overrides",
        "packing",
        "prompt_data",
        "prompt_buckets",
        "report",
        "chips",
    ],
    ["models", "base_model"],
    ["peft_adapter"],
    ["runs", "generation", "training", "plan", "plan_shapes", "model_card", "fingerprints"],
    ["reward_data", "sft_loop", "ppo_setup", "mesh_checks", "model_checks", "export", "origins"],
    ["reward_loop", "ppo_loop", "summary", "phases"],
    ["evaluate", "accounts", "preview", "planner"],
    ["checks", "chat_terminal", "plan_report"],
    ["pipeline"],
    ["cli"],
]
ROW = {name: row for row, names in enumerate(CORE + SHELL) for name in names}
CORE_NAMES = {name for names in CORE for name in names}

# The purity line: nothing below it can touch a file, a clock or a device.
PURE = {"jax", "flax", "optax", "chex"}
PURE |= {"collections", "dataclasses", "functools", "math", "typing"}
# Those that cost a second to load, and that `import ppo_jax` therefore leaves alone.
HEAVY = ["orbax", "transformers", "tokenizers", "torch", "matplotlib", "sklearn", "tensorboardX"]


def modules():
    return sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(name):
    """(modules of this package, names of the others) that a module imports, wherever it does."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            dotted = [node.module]
            if node.module == "ppo_jax":
                dotted = [f"ppo_jax.{alias.name}" for alias in node.names]
        else:
            continue
        for path in dotted:
            first, *rest = path.split(".")
            if first != "ppo_jax":
                others.add(first)
            elif rest and rest[0] in ROW:
                ours.add(rest[0])
    return ours, others


def test_every_module_has_its_row():
    assert sorted(ROW) == modules()


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_the_rows_below(name):
    ours, _ = imports(name)
    above = {other for other in ours if ROW[other] >= ROW[name]}
    assert not above, f"{name} must not import {sorted(above)}"


@pytest.mark.parametrize("name", sorted(CORE_NAMES))
def test_the_core_imports_only_what_computes(name):
    ours, others = imports(name)
    assert others <= PURE, f"{name} is below the purity line"
    assert ours <= CORE_NAMES


@pytest.mark.parametrize("name", sorted(CORE_NAMES))
def test_the_core_opens_no_file_and_prints_nothing(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


def test_only_the_module_that_is_named_for_it_knows_a_third_party():
    """What may change under us is behind one file each."""
    homes = {
        "orbax": {"checkpoints"},
        "tensorboardX": {"metrics"},
        "tqdm": {"metrics"},
        "pyarrow": {"formats"},
        "datasets": {"formats"},
        "jinja2": {"chat"},
        "matplotlib": {"plots"},
        "gguf": {"gguf_file"},
        "tokenizers": {"gguf_file", "vocabulary"},
        "transformers": {"gguf_file", "vocabulary"},
        "sklearn": {"judges"},
        "ml_collections": {"config", "pipeline", "cli"},
    }
    users = {name: imports(name)[1] for name in modules()}
    for package, home in homes.items():
        assert {name for name, others in users.items() if package in others} <= home, package


def test_the_shell_is_no_part_of_what_an_import_gives():
    ours, others = imports("__init__")
    assert ours <= CORE_NAMES and others == {"importlib"}


def test_importing_the_core_loads_nothing_heavy():
    code = f"import sys, ppo_jax; print([x for x in {HEAVY!r} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_submodule_of_the_shell_is_loaded_when_it_is_asked_for():
    for name in ppo_jax.SHELL:
        assert inspect.ismodule(getattr(ppo_jax, name))
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


def test_what_is_imported_into_the_package_is_public():
    """No name slips out: what __init__ imports is in __all__, and the other way round."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(ppo_jax.__all__)


@pytest.mark.parametrize("name", modules())
def test_every_module_opens_with_what_it_is(name):
    assert ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text()))
