"""A setting is known, of its type, in its range, explained and read; or the run does not begin."""

import ast
import dataclasses
import importlib.util
import math
import pathlib
import subprocess
import sys

import pytest
from ml_collections import config_dict

from ppo_jax import config as settings_module
from ppo_jax.config import Config, from_config_dict
from ppo_jax.pipeline import fill_in_workdir
from ppo_jax.ppo import Recipe
from ppo_jax.rollout import Sampling
from ppo_jax.structs import Hyperparameters, Optimizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SWEEPS = [path for path in CONFIGS if "def sweep(" in path.read_text()]
VARIANTS = {"quickstart": ["default", "tiny"]}
SECTIONS = [
    settings_module.ScratchSettings,
    settings_module.ModelSettings,
    settings_module.OptimizerSettings,
    settings_module.SFTSettings,
    settings_module.RewardSettings,
    settings_module.PPOSettings,
    settings_module.EvaluateSettings,
    Config,
]


def whole():
    """The shortest config with every section."""
    optimizer = {"learning_rate": 1e-3}
    return {
        "model": {"scratch": {}, "vocabulary_data": "{workdir}/data/texts.jsonl"},
        "sft": {"data": "texts.jsonl", "optimizer": dict(optimizer)},
        "reward": {"data": "pairs.jsonl", "optimizer": dict(optimizer)},
        "ppo": {
            "prompts": "prompts.jsonl",
            "value_learning_rate": 1e-3,
            "optimizer": dict(optimizer),
        },
        "evaluate": {"prompts": "test.jsonl"},
    }


def changed(name, value):
    """`whole()` with one field set, or taken out when the value is `...`."""
    config = whole()
    *sections, field = name.split(".")
    place = config
    for section in sections:
        place = place[section]
    if value is ...:
        del place[field]
    else:
        place[field] = value
    return config


def load_config_file(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants():
    return [(path, name) for path in CONFIGS for name in VARIANTS.get(path.stem, [None])]


# --- the files of configs/ ------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "variant"), variants(), ids=lambda x: getattr(x, "stem", x))
def test_every_config_of_the_repository_is_valid(path, variant):
    arguments = [] if variant is None else [variant]
    values = load_config_file(path).get_config(*arguments)
    assert isinstance(values, config_dict.ConfigDict)
    assert isinstance(from_config_dict(values), Config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(path):
    text = load_config_file(path).__doc__
    assert f"--config=configs/{path.name}" in text and "python experiments/" in text


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_is_a_valid_config(path):
    module = load_config_file(path)
    points = list(module.sweep())
    assert len({str(point) for point in points}) == len(points) >= 2
    for point in points:
        values = module.get_config().lock()
        values.update_from_flattened_dict(point)
        valid = from_config_dict(values)
        for name, value in point.items():
            found = valid
            for part in name.split("."):
                found = getattr(found, part)
            assert found == value, name


def test_an_unknown_variant_is_refused_with_the_known_ones():
    quickstart = load_config_file(ROOT / "configs" / "quickstart.py")
    with pytest.raises(ValueError, match="'huge'.*default.*tiny"):
        quickstart.get_config("huge")


# --- what is refused ------------------------------------------------------------------------------

BAD = [
    # (field, value, in the message besides the field)
    ("sed", 1, "unknown setting sed"),
    ("ppo.kl_coeff", 0.1, "unknown setting ppo.kl_coeff"),
    ("ppo.optimizer.lr", 0.1, "unknown setting ppo.optimizer.lr"),
    ("model.scratch.depth", 2, "unknown setting model.scratch.depth"),
    ("evaluate.judge", "", "unknown setting evaluate.judge"),
    # not there
    ("model", ..., "model must be given"),
    ("sft.data", ..., "sft.data must be given"),
    ("sft.optimizer", ..., "sft.optimizer must be given"),
    ("ppo.prompts", ..., "ppo.prompts must be given"),
    ("ppo.value_learning_rate", ..., "ppo.value_learning_rate must be given"),
    ("ppo.optimizer.learning_rate", ..., "ppo.optimizer.learning_rate must be given"),
    ("evaluate.prompts", ..., "evaluate.prompts must be given"),
    ("model.vocabulary_data", ..., "train the tokenizer"),
    ("ppo", None, "evaluate needs a ppo section"),
    # of another type
    ("seed", 1.0, "1.0"),
    ("seed", True, "True"),
    ("sft", "texts.jsonl", "a section of settings"),
    ("sft.batch_size", "32", "'32'"),
    ("sft.batch_size", 32.0, "32.0"),
    ("sft.data", None, "None"),
    ("sft.optimizer", 1e-3, "a section of settings"),
    ("reward.optimizer.warmup_steps", 2.5, "2.5"),
    ("ppo.kl_coef", "0.1", "'0.1'"),
    ("ppo.kl_coef", True, "True"),
    ("ppo.stop_tokens", "<end>", "'<end>'"),
    ("ppo.stop_tokens", [1], "[1]"),
    ("model.scan_layers", 1, "1"),
    # no number
    ("ppo.kl_coef", math.nan, "finite"),
    ("sft.num_epochs", math.inf, "finite"),
    ("sft.optimizer.learning_rate", math.inf, "finite"),
    ("sft.hidden_cache_gb", -math.inf, "finite"),
    # out of range
    ("seed", -1, ">= 0"),
    ("sft.num_epochs", 0.0, "> 0"),
    ("sft.batch_size", 0, "> 0"),
    ("sft.max_length", -4, "> 0"),
    ("sft.eval_every", 0, "> 0"),
    ("sft.save_every", 0, "> 0"),
    ("sft.data", "", "JSONL"),
    ("sft.validation_fraction", 0.0, "(0, 1)"),
    ("sft.validation_fraction", 1.0, "(0, 1)"),
    ("sft.hidden_cache_gb", -2.5, "-2.5"),
    ("reward.num_layers", -1, ">= 0"),
    ("reward.pairs_per_batch", 0, "> 0"),
    ("reward.batch_size", 1, ">= 2"),
    ("ppo.num_iterations", 0, "> 0"),
    ("ppo.response_length", 0, "> 0"),
    ("ppo.temperature", 0.0, "> 0"),
    ("ppo.kl_coef", -0.1, ">= 0"),
    ("ppo.vf_coef", -0.1, ">= 0"),
    ("ppo.value_learning_rate", -1e-3, ">= 0"),
    ("ppo.gamma", 1.1, "[0, 1]"),
    ("ppo.gae_lambda", -0.1, "[0, 1]"),
    ("ppo.clip_range", 0.0, "(0, 1)"),
    ("ppo.clip_range", 1.0, "(0, 1)"),
    ("ppo.value_clip_range", 0.0, "> 0"),
    ("ppo.top_k", -1, ">= 0"),
    ("ppo.top_p", 0.0, "(0, 1]"),
    ("ppo.top_p", 1.5, "(0, 1]"),
    ("ppo.min_p", 1.5, "[0, 1]"),
    ("ppo.target_kl", 0.0, "> 0"),
    ("ppo.num_samples", -1, ">= 0"),
    ("evaluate.num_prompts", 0, "> 0"),
    ("evaluate.temperature", -0.5, ">= 0"),
    ("model.scratch.vocab_size", 256, ">= 300"),
    ("model.scratch.num_layers", 0, "> 0"),
    # no such choice
    ("model.dtype", "int8", "bfloat16"),
    ("reward.format", "pairs", "preferences"),
    ("ppo.missing_eos", "ignore", "penalty"),
    ("ppo.kl_estimator", "k4", "k3"),
    ("ppo.kl_control", "none", "adaptive"),
    ("sft.trainable", "top", "'head'"),
    ("sft.trainable", "0", ">= 1"),
    ("sft.trainable", -1, ">= 1"),
    ("sft.trainable", 1.5, "1.5"),
    ("reward.trainable", True, "True"),
    ("ppo.trainable", "", "'all'"),
    ("ppo.value_trainable", "none", "'head'"),
    # sizes that do not divide
    ("model.scratch.embed_dim", 100, "multiple of 2 x num_heads (8)"),
    ("sft.num_micro_batches", 5, "multiple of num_micro_batches (5)"),
    ("ppo.num_minibatches", 3, "multiple of num_minibatches x num_micro_batches (3)"),
    ("reward.batch_size", 33, "even"),
    # both, or neither
    ("model.path", "some/folder", "either"),
    ("model.scratch", None, "either"),
    ("ppo.reward_function", "module:function", "either"),
    ("ppo.reward_model", "", "either"),
]
# The field that a message names, where it is the other one of two.
NAMED = {
    "sft.num_micro_batches": "sft.batch_size",
    "ppo.num_minibatches": "ppo.rollout_batch_size",
    "model.scratch": "model",
    "model.path": "model",
    "ppo.reward_function": "reward_function=",
    "ppo.reward_model": "reward_model=",
}


@pytest.mark.parametrize(("field", "value", "words"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_setting_is_refused_with_its_field(field, value, words):
    with pytest.raises(ValueError) as error:
        from_config_dict(changed(field, value))
    assert NAMED.get(field, field) in str(error.value)
    assert words in str(error.value)


OPTIMIZER_BAD = [
    ("learning_rate", -1e-3, ">= 0"),
    ("schedule", "step", "cosine"),
    ("warmup_steps", -1, ">= 0"),
    ("final_fraction", 1.5, "[0, 1]"),
    ("max_grad_norm", 0.0, "> 0"),
    ("weight_decay", -0.1, ">= 0"),
    ("b1", 1.0, "[0, 1)"),
    ("b2", -0.1, "[0, 1)"),
    ("eps", 0.0, "> 0"),
]


@pytest.mark.parametrize("section", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(("field", "value", "words"), OPTIMIZER_BAD)
def test_a_bad_optimizer_is_refused_with_its_stage(section, field, value, words):
    with pytest.raises(ValueError) as error:
        from_config_dict(changed(f"{section}.optimizer.{field}", value))
    assert f"{section}.optimizer.{field}" in str(error.value)
    assert words in str(error.value)


# --- what is accepted -----------------------------------------------------------------------------


def test_what_is_not_given_takes_its_default_and_a_missing_section_is_no_stage():
    config = from_config_dict({"model": {"path": "somewhere"}})
    assert config.seed == 0 and config.model.dtype == "float32"
    assert config.sft is config.reward is config.ppo is config.evaluate is None


@pytest.mark.parametrize(
    ("given", "meant"), [("all", "all"), ("head", "head"), ("4", 4), (4, 4), ("007", 7)]
)
def test_trainable_is_a_word_or_a_number_of_layers(given, meant):
    assert from_config_dict(changed("reward.trainable", given)).reward.trainable == meant


def test_an_integer_stands_for_a_float_and_a_list_for_a_tuple():
    assert type(from_config_dict(changed("ppo.kl_coef", 1)).ppo.kl_coef) is float
    assert from_config_dict(changed("ppo.stop_tokens", ["."])).ppo.stop_tokens == (".",)


def test_no_limit_is_a_limit():
    assert from_config_dict(changed("sft.optimizer.max_grad_norm", math.inf))
    assert from_config_dict(changed("sft.hidden_cache_gb", math.inf))


def test_settings_cannot_be_changed_later():
    config = from_config_dict(whole())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ppo.kl_coef = 1.0


def test_the_workdir_stands_in_every_path():
    values = whole()
    values["ppo"]["prompts"] = "{workdir}/data/prompts.jsonl"
    filled = fill_in_workdir(from_config_dict(values), pathlib.Path("runs/a"))
    assert filled.model.vocabulary_data == "runs/a/data/texts.jsonl"
    assert filled.ppo.prompts == "runs/a/data/prompts.jsonl"
    assert "{workdir}" not in str(filled)
    assert filled.reward == from_config_dict(values).reward


SHOW = """
from absl import app, flags
from ml_collections import config_flags
from ppo_jax.config import from_config_dict
CONFIG = config_flags.DEFINE_config_file("config")
def main(argv):
    c = from_config_dict(CONFIG.value)
    print(c.sft.trainable, c.ppo.kl_coef, c.ppo.trainable, c.seed, c.sft.optimizer.learning_rate)
app.run(main)
"""


def command_line(*overrides):
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}:tiny"
    command = [sys.executable, "-c", SHOW, config, *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_has_the_last_word():
    done = command_line(
        "--config.sft.trainable=all",
        "--config.ppo.kl_coef=0.125",
        "--config.ppo.trainable=2",
        "--config.seed=3",
        "--config.sft.optimizer.learning_rate=1",
    )
    assert done.stdout.split() == ["all", "0.125", "2", "3", "1.0"], done.stderr


def test_a_misspelt_flag_stops_the_command():
    done = command_line("--config.ppo.kl_coeff=0.125")
    assert done.returncode != 0 and "kl_coeff" in done.stderr


# --- the settings themselves ----------------------------------------------------------------------


def lines_of_fields():
    """(class, field, its line, the line above) for every setting."""
    lines = pathlib.Path(settings_module.__file__).read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for cls in SECTIONS:
        for node in classes[cls.__name__].body:
            if isinstance(node, ast.AnnAssign):
                source = " ".join(lines[node.lineno - 1 : node.end_lineno])
                yield cls.__name__, node.target.id, source, lines[node.lineno - 2]


def test_every_setting_is_explained():
    silent = [
        f"{cls}.{field}"
        for cls, field, line, above in lines_of_fields()
        if "  # " not in line and not above.lstrip().startswith("#")
    ]
    assert not silent


def test_the_list_of_sections_is_complete():
    found = {
        value
        for value in vars(settings_module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    assert found == set(SECTIONS)
    assert len(list(lines_of_fields())) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS)


def test_no_setting_is_accepted_and_ignored():
    """Each is read as an attribute outside config.py, or goes by name into a struct of the core."""
    read = set()
    for path in (ROOT / "ppo_jax").glob("*.py"):
        if path.name != "config.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for struct in (Optimizer, Hyperparameters, Recipe, Sampling):
        read |= {field.name for field in dataclasses.fields(struct)}
    ignored = [f"{cls}.{field}" for cls, field, _, _ in lines_of_fields() if field not in read]
    assert not ignored


def test_what_a_resumed_run_may_change_are_settings():
    names = {field for _, field, _, _ in lines_of_fields()}
    assert settings_module.MAY_CHANGE <= names
