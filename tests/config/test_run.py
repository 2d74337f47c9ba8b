"""A setting is known, of its type, in its range, explained and read; or the run does not begin."""

import ast
import dataclasses
import importlib.util
import inspect
import math
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from ml_collections import config_dict

from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.config.mesh import RolloutRules
from ppo_jax.config.parsing import changeable_fields, hints_of, options
from ppo_jax.config.ppo import PPOSettings, ValueOptimizerSettings
from ppo_jax.config.run import (
    Config,
    ModelSettings,
    ScratchSettings,
    from_config_dict,
    with_defaults,
)
from ppo_jax.config.stages import (
    EvaluateSettings,
    LoRASettings,
    OptimizerSettings,
    RewardSettings,
    SFTSettings,
)
from ppo_jax.core.types import Hyperparameters, Optimizer
from ppo_jax.distributed import layout as sharding
from ppo_jax.io.run_folder import fill_in_workdir, without_workdir
from ppo_jax.rollout.sampling import Sampling
from tests.support.tiny_config import changed, whole

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SWEEPS = [path for path in CONFIGS if "def sweep(" in path.read_text()]
VARIANTS = {
    "pod": [
        "gemma3_27b",
        "llama3_70b",
        "llama3_8b",
        "qwen3_0_6b",
        "qwen3_30b_a3b",
        "smollm2_135m",
    ],
    "ppo": ["default", "scratch"],
    "quickstart": ["default", "tiny", "validation"],
    "reward": ["default", "scratch"],
    "sft": ["default", "scratch"],
    "verifiable": ["acting", "reasoning"],
}
SECTIONS = [
    ScratchSettings,
    ModelSettings,
    OptimizerSettings,
    SFTSettings,
    RewardSettings,
    PPOSettings,
    EvaluateSettings,
    Config,
    sharding.AxisRules,
    sharding.MeshSettings,
    LoRASettings,
    ValueOptimizerSettings,
]


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused_with_the_known_ones(path):
    module, known = load_config_file(path), VARIANTS.get(path.stem)
    assert ("variant" in inspect.signature(module.get_config).parameters) == (known is not None)
    if known:
        with pytest.raises(ValueError, match=re.escape(f"'huge'; choose from {known}")):
            module.get_config("huge")


@pytest.mark.parametrize(("name", "variant"), [("sft", "scratch"), ("quickstart", "tiny")])
def test_the_size_of_a_model_from_scratch_is_a_setting(name, variant):
    values = load_config_file(ROOT / "configs" / f"{name}.py").get_config(variant).lock()
    values.update_from_flattened_dict({"model.scratch.num_layers": 2})
    assert from_config_dict(values).model.scratch.num_layers == 2


# --- what is accepted -----------------------------------------------------------------------------


def test_what_is_not_given_takes_its_default_and_a_missing_section_is_no_stage():
    config = from_config_dict({"model": {"path": "somewhere"}})
    assert config.seed == 0 and config.model.dtype == "float32"
    assert config.sft is config.reward is config.ppo is config.evaluate is None


@pytest.mark.parametrize(
    ("given", "meant"), [("all", "all"), ("head", "head"), ("4", 4), (4, 4), ("007", 7)]
)
def test_trainable_is_a_word_or_a_number_of_layers(given, meant):
    assert from_config_dict(changed({"reward.trainable": given})).reward.trainable == meant


def test_an_integer_stands_for_a_float_and_a_list_for_a_tuple():
    assert type(from_config_dict(changed({"ppo.kl_coef": 1})).ppo.kl_coef) is float
    assert from_config_dict(changed({"ppo.stop_tokens": ["."]})).ppo.stop_tokens == (".",)


def test_no_limit_is_a_limit():
    assert from_config_dict(changed({"sft.optimizer.max_grad_norm": math.inf}))
    assert from_config_dict(changed({"sft.hidden_cache_gb": math.inf}))


def test_the_two_ways_to_start_a_critic():
    for source in ("", "reward_model", "policy"):
        valid = from_config_dict(changed({"ppo.critic_init_from": source}))
        assert valid.ppo.critic_init_from == source


def test_the_upper_clip_is_the_lower_one_or_wider():
    for high in (0, 0.2, 0.28, 1.5):
        valid = from_config_dict(changed({"ppo.clip_range_high": high}))
        assert valid.ppo.clip_range_high == high


def test_a_clip_of_1_has_no_lower_limit_and_any_upper_one():
    for high in (0, 0.2, 4.0):
        valid = from_config_dict(changed({"ppo.clip_range": 1.0, "ppo.clip_range_high": high}))
        assert valid.ppo.clip_range == 1
    with pytest.raises(ValueError, match="clip_range_high must be >= 0, got -0.1"):
        from_config_dict(changed({"ppo.clip_range": 1.0, "ppo.clip_range_high": -0.1}))


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
    ppo = dataclasses.asdict(filled.ppo)
    assert without_workdir(ppo, pathlib.Path("runs/a")) == dataclasses.asdict(
        from_config_dict(values).ppo
    )
    assert without_workdir(ppo, pathlib.Path("runs")) != ppo != without_workdir(ppo, "runs/a")
    assert without_workdir(ppo, pathlib.Path("run")) == ppo
    assert filled.reward == from_config_dict(values).reward


# --- the command line -----------------------------------------------------------------------------

SHOW = """
import operator, sys
from absl import app, flags
from ml_collections import config_flags
from ppo_jax.config import from_config_dict
CONFIG = config_flags.DEFINE_config_file("config")
def main(argv):
    config = from_config_dict(CONFIG.value)
    print(*(operator.attrgetter(name)(config) for name in argv[1:]))
app.run(main)
"""

WHOLE_NUMBERS = """
from ppo_jax.config import with_defaults
def get_config():
    optimizer = dict(learning_rate=1)
    sft = dict(data="texts.jsonl", num_epochs=20, trainable=4, optimizer=optimizer)
    return with_defaults(dict(model=dict(path="somewhere"), sft=sft))
"""


def command_line(config, overrides, show=()):
    """A command with `--config`, and what it reads in the settings named in `show`."""
    flags = [f"--config={config}"]
    flags += [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-c", SHOW, *flags, *show]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_has_the_last_word():
    changes = {
        "sft.trainable": "all",
        "sft.num_epochs": "20.5",
        "ppo.kl_coef": "0.125",
        "ppo.trainable": "2",
        "ppo.critic_init_from": "policy",
        "seed": "3",
        "sft.optimizer.learning_rate": "1",
    }
    done = command_line(f"{ROOT / 'configs' / 'quickstart.py'}:tiny", changes, changes)
    assert done.stdout.split() == [*changes.values()][:-1] + ["1.0"], done.stderr


def test_a_whole_number_in_a_config_file_does_not_bind_the_command_line(tmp_path):
    path = tmp_path / "whole_numbers.py"
    path.write_text(WHOLE_NUMBERS)
    names = ["sft.num_epochs", "sft.trainable", "sft.optimizer.learning_rate", "sft.batch_size"]
    changes = {"sft.num_epochs": "20.5", "sft.trainable": "all", "sft.hidden_cache_gb": "inf"}
    done = command_line(path, changes, [*names, "sft.hidden_cache_gb"])
    assert done.stdout.split() == ["20.5", "all", "1.0", "32", "inf"], done.stderr
    done = command_line(path, {"sft.batch_size": "0.5"})
    assert done.returncode != 0 and "batch_size" in done.stderr


def test_a_misspelt_flag_stops_the_command():
    done = command_line(ROOT / "configs" / "sft.py", {"ppo.kl_coeff": "0.125"})
    assert done.returncode != 0 and "ppo" in done.stderr
    done = command_line(ROOT / "configs" / "ppo.py", {"ppo.kl_coeff": "0.125"})
    assert done.returncode != 0 and "kl_coeff" in done.stderr


def test_a_config_file_may_leave_out_every_default():
    values = with_defaults(whole())
    assert from_config_dict(values) == from_config_dict(whole())
    assert values.ppo.kl_coef == 0.05 and values.model.scratch.num_layers == 4


# --- the settings themselves ----------------------------------------------------------------------


def lines_of_fields():
    """(class, field, its line, the line above) for every setting."""
    for cls in SECTIONS:
        lines = pathlib.Path(inspect.getsourcefile(cls)).read_text().splitlines()
        tree = ast.parse("\n".join(lines))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in classes[cls.__name__].body:
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                source = " ".join(lines[node.lineno - 1 : node.end_lineno])
                yield cls.__name__, node.target.id, source, lines[node.lineno - 2]


def test_every_setting_is_explained():
    silent = [
        f"{cls}.{field}"
        for cls, field, line, above in lines_of_fields()
        if "  # " not in line and not above.lstrip().startswith("#")
    ]
    assert not silent


def sections_of(cls):
    """A section and all that are in it."""
    inner = (option for hint in hints_of(cls).values() for option in options(hint))
    return [cls] + [
        x for section in filter(dataclasses.is_dataclass, inner) for x in sections_of(section)
    ]


def test_the_list_of_sections_is_complete():
    assert set(SECTIONS) == set(sections_of(Config)) - {RolloutRules}  # has AxisRules' fields
    assert len(list(lines_of_fields())) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS)


def test_no_setting_is_accepted_and_ignored():
    """Each is read as an attribute by more than its rules, or goes by name into a struct of the
    core."""
    read = set()
    for path in (ROOT / "ppo_jax").rglob("*.py"):
        if path.parent.name != "config":
            nodes = ast.walk(ast.parse(path.read_text()))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {field.name for field in dataclasses.fields(sharding.AxisRules)}  # named by the axes
    for struct in (Optimizer, Hyperparameters, PPOOptions, Sampling):
        read |= {field.name for field in dataclasses.fields(struct)}
    ignored = [f"{cls}.{field}" for cls, field, _, _ in lines_of_fields() if field not in read]
    assert not ignored


def test_what_a_resumed_run_may_change():
    ppo, sft = map(changeable_fields, (PPOSettings, SFTSettings))
    numbers = {field.name for field in dataclasses.fields(Hyperparameters)}
    # The state depends on whether there are these.
    numbers -= {"optimizer", "value_optimizer", "value_range", "critic_warmup_tolerance"}
    numbers -= {"target_entropy", "penalty_target_kl", "ref_ema_decay", "ref_reset_every"}
    assert numbers | {"packing", "num_iterations", "optimizer.learning_rate"} <= ppo
    assert sft == {f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerSettings)} | {
        "num_micro_batches",
        "router_coef",
        "hidden_cache_gb",
        "eval_every",
        "save_every",
        "keep",
    }
    of_model = {"remat", "attention", "chat_template", "chat_date"}
    assert changeable_fields(ModelSettings, "model.") == {f"model.{name}" for name in of_model}


def test_a_dtype_is_taken_as_jax_has_it():
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
        model = {"path": "model", "dtype": dtype, "frozen_dtype": dtype}
        for values in ({"model": model}, with_defaults({"model": model})):
            config = from_config_dict(values)
            assert config.model.dtype == config.model.frozen_dtype == "bfloat16"
    for dtype in (jnp.float64, None, 16, object()):
        with pytest.raises(ValueError, match=r"model\.dtype must be"):
            from_config_dict({"model": {"path": "model", "dtype": dtype}})
