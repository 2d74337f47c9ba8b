"""A sweep with a mistake ends with one line that names it, before anything runs or is made."""

import json
import re
from unittest import mock

import pytest

from ppo_jax.config.run import with_defaults
from ppo_jax.pipeline import preflight, study
from ppo_jax.pipeline.sweep import Sweep
from tests.support import tiny_run
from tests.support.command_line import run_script

CONFIG = """
from ppo_jax.config import with_defaults

def get_config(variant="tiny"):
    return with_defaults({values!r})

{sweep}
"""
# What is wrong -> the line, in which `...` stands for anything.
GRIDS = """
--grid=
    --grid must be 'NAME=VALUE,VALUE; NAME=FIRST:END', got ''
--grid=ppo.kl_coef
    --grid must be 'NAME=VALUE,VALUE; NAME=FIRST:END', got 'ppo.kl_coef'
--grid=ppo.kl_coeff=0,1
    unknown setting ppo.kl_coeff; did you mean 'ppo.kl_coef'?
--grid=sed=0:3
    unknown setting sed; did you mean 'seed'?
--grid=ppo=1
    ppo is a section: a point changes a field of it, ppo.prompts
--grid=ppo.kl_coef=
    ppo.kl_coef must be a number, got ''
--grid=ppo.num_iterations=1.5
    ppo.num_iterations must be a whole number, got '1.5'
--grid=ppo.packing=2
    ppo.packing must be True or False, got '2'
--grid=seed=3:3
    --grid: seed must be FIRST:END with 1 to 10,000 whole numbers from FIRST to END - 1, got 3:3
--grid=seed=5:2
    --grid: seed must be FIRST:END with ..., got 5:2
--grid=seed=0:2;seed=4
    --grid has seed twice
--grid=seed=1,2,1
    --grid: seed has 1 twice
--grid=seed=0:1000;ppo.seed=0:1000
    a sweep has at most 10,000 points, got 1,000,000
--grid=ppo.stop_tokens=('a'
    --grid has a quote or a bracket without its other half: "ppo.stop_tokens=('a'"
--grid=ppo.kl_coef=uniform(0,0.2)
    --grid: ppo.kl_coef is uniform(...), which --random=N or --optimize draws from
--random=3
    --random draws from --grid, which is missing
--random_seed=3 --grid=seed=1
    --random_seed is of --random and --optimize, which are missing
--random=0 --grid=ppo.kl_coef=uniform(0,0.2)
    --random must be in [1, 10,000], got 0
--random=3 --grid=seed=0:2
    --random must be at most the points of --grid, 2, got 3
--random=3 --grid=ppo.kl_coef=log(0,0.2)
    --grid: ppo.kl_coef must be log(a,b) with 0 < a < b, got (0,0.2)
--random=3 --grid=ppo.kl_coef=uniform(0.2,0)
    --grid: ppo.kl_coef must be uniform(a,b) with a < b, got (0.2,0)
--random=3 --grid=ppo.kl_coef=gauss(0,1)
    --grid: ppo.kl_coef must be log(a,b) or uniform(a,b), got gauss(0,1)
--random=3 --grid=ppo.kl_coef=uniform(-1,-0.5)
    the point kl_coef=-0.6815: ppo.kl_coef must be >= 0, got -0.6815
--grid=ppo.clip_range=0.2,2
    the point clip_range=2: ppo.clip_range must be in (0, 1], or inf, got 2.0
--grid=ppo.num_minibatches=1,3
    the point num_minibatches=3: ppo.rollout_batch_size must be a multiple of ... (3), got 8
--grid=ppo.trainable=1,9
    the point trainable=9: ppo.trainable must be at most 2, the model's layers, got 9
--grid=ppo.reward_function=math:sin;ppo.reward_model=
    the point reward_function=math-sin,...: ppo.reward_function must be a function (...
--grid=reward.init_from=base,a/b/c
    the point reward.init_from=a-b-c-...: reward.init_from: there is no folder or .gguf file a/b/c
--grid=ppo.prompts=none.jsonl
    the point prompts=none.jsonl: ppo.prompts must be a file, got 'none.jsonl', which is not there
--grid=mesh.data=1,3
    the point mesh.data=3: mesh (data=3, fsdp=1, model=1) needs 3 devices, have 1
--grid=ppo.kl_coef=0.05;ppo.seed=0,-1,-2
    the point kl_coef=0.05,ppo.seed=-2: ppo.seed must be >= 0, or -1 for the run's seed, got -2
--grid=seed=1 --shard=2/2
    --shard must be i/n with 0 <= i < n, got '2/2'
--grid=seed=1 --shard=half
    --shard must be i/n with 0 <= i < n, got 'half'
--grid=seed=1 --jobs=99999
    --jobs must be in [1, ...], the cores of this machine, got 99999
--grid=seed=1 --jobs=0
    --jobs must be in [1, ...], the cores of this machine, got 0
--grid=seed=1 --retries=-1
    flag --retries=-1: -1 is not a non-negative integer (--help lists the flags)
--grid=seed=1 --multihost --jobs=2
    with --multihost all processes run the points together...
--grid=seed=1 --trials=3
    --trials and --direction are of --optimize, which is missing
--optimize=reward/score_mean --trials=3
    --optimize needs --grid, what to choose from, and --trials=N
--optimize=reward/score_mean --grid=seed=1
    --optimize needs --grid, what to choose from, and --trials=N
--optimize=reward/score_mean --grid=seed=1 --trials=0
    --trials must be >= 1, got 0
--optimize=score --grid=seed=1 --trials=1
    --optimize must be a metric, reward/score_mean for instance, got 'score'
--optimize=a/b --grid=seed=1 --trials=1 --vectorize
    --vectorize is not for --optimize, whose points come one by one
--optimize=a/b --grid=seed=1 --trials=1 --random=2
    with --optimize leave --random, --shard and --multihost out...
--grid=seed=1 --process_id=1
    --coordinator, --num_processes and --process_id need --multihost
"""
SWEEPS = r"""
settings = 1
    {config} has no function sweep(): add one, or give --grid='NAME=...
def sweep():\n    return {"seed": 1}
    sweep() of {config} must give points, {name: value} each, got {'seed': 1}
def sweep():\n    return []
    sweep() of {config} must give 1 to 10,000 points, got none
def sweep():\n    yield {"seed": 1}\n    yield {"ppo.beta": 1}
    sweep() of {config}, point 2: unknown setting ppo.beta; known: [...
def sweep():\n    yield {"seed": "1"}
    sweep() of {config}, point 1: seed must be a whole number, got '1'
def sweep():\n    yield {"seed": 1}\n    yield {"ppo.gamma": 0.5}\n    yield {"seed": 1}
    the points seed=1 and seed=1 are equal
def sweep():\n    return [{}, {"ppo.kl_coef": 0.05}]
    the points base and kl_coef=0.05 are equal
def sweep():\n    yield {"seed": 1}\n    yield {"seed": 1 / 0}
    sweep() of {config} raised ZeroDivisionError: division by zero
def sweep(a, b):\n    yield {"seed": 1}
    sweep() of {config} raised TypeError: ...
"""


def table(text):
    rows = text.strip().splitlines()
    return list(zip(rows[::2], map(str.strip, rows[1::2]), strict=True))


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def write_config(folder, sweep="", **changes):
    path = folder / "config.py"
    values = {**tiny_run.config(), **changes}
    path.write_text(CONFIG.format(values=values, sweep=sweep.replace("\\n", "\n")))
    return path


def refused(config, message, *flags):
    """The script ends with the line and with 2, and has made nothing."""
    before = set(config.parent.iterdir())
    with mock.patch.object(Sweep, "run", side_effect=AssertionError("it runs")):
        ended = run_script("sweep", f"--config={config}", f"--workdir={config.parent}/run", *flags)
    message = message.replace("{config}", str(config))
    line = ".*".join(re.escape(part) for part in message.split("..."))
    hint = r"( \(--help lists the flags\))?"
    assert re.fullmatch(rf"sweep\.py: {line}{hint}\n", ended.err), ended.err
    assert (ended.code, ended.out) == (2, "") and set(config.parent.iterdir()) == before


@pytest.mark.parametrize(("flags", "message"), table(GRIDS))
def test_a_malformed_grid_is_told_in_one_line(config, flags, message):
    refused(config, message, *re.split(r" (?=--)", flags))


@pytest.mark.parametrize(("sweep", "message"), table(SWEEPS))
def test_a_malformed_list_is_told_in_one_line(tmp_path, sweep, message):
    refused(write_config(tmp_path, sweep), message)


def test_a_section_that_the_config_lacks_is_told(tmp_path):
    told = "the point evaluate.num_prompts=3: evaluate.num_prompts cannot be set: the config has..."
    refused(write_config(tmp_path, evaluate=None), told, "--grid=evaluate.num_prompts=3")


def test_there_are_enough_malformed_sweeps():
    assert len(table(GRIDS)) + len(table(SWEEPS)) >= 45


def settings(**ppo):
    values = tiny_run.config()
    values["ppo"] |= ppo
    return with_defaults(values).to_dict()


POINTS = [{"ppo.kl_coef": 0.0}, {"ppo.kl_coef": 0.5}]


def test_another_base_config_is_refused_and_a_longer_or_otherwise_judged_one_is_not(tmp_path):
    study.keep_base(settings(), tmp_path)
    base = json.loads((tmp_path / "base.json").read_text())["config"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", base["model"]["chat_date"])
    told = r"begun with other settings: ppo.gamma: 1.0 -> 0.9. Set them back, or choose"
    with pytest.raises(ValueError, match=told):
        study.plan_sweep(settings(gamma=0.9), POINTS, tmp_path, 1)
    longer = settings(num_iterations=9) | {"mesh": {"data": 1}}
    longer["evaluate"]["num_prompts"] = 3
    works = study.plan_sweep(longer, POINTS, tmp_path, 1)
    assert [work.settings["ppo"]["num_iterations"] for work in works] == [9, 9]
    base["model"]["chat_date"] = "2020-02-02"  # a sweep goes on after midnight
    (tmp_path / "base.json").write_text(json.dumps({"config": base}))
    works = study.plan_sweep(settings(), POINTS, tmp_path, 1)
    assert works[0].settings["model"]["chat_date"] == "2020-02-02"


def test_the_folder_of_a_run_is_none_of_a_sweep(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run: choose another workdir for a sweep"):
        study.plan_sweep(settings(), POINTS, tmp_path, 1)


def test_data_files_are_read_once_for_all_points(tmp_path, monkeypatch):
    tiny_run.prepare(tmp_path / "data")
    (tmp_path / "base").mkdir()
    reads = []

    def record(config, *_):
        reads.append(config.ppo.prompts)

    monkeypatch.setattr(preflight, "check_files", record)
    values = with_defaults(
        tiny_run.on_base(
            tmp_path,
            sft={},
            ppo={"reward_model": "", "reward_function": "tests.support.tiny_run:letters"},
        )
    )
    study.plan_sweep(values.to_dict(), POINTS, tmp_path / "sweep", 1)
    others = [{"ppo.prompts": str(tmp_path / "data" / "test_prompts.jsonl")}]
    study.plan_sweep(values.to_dict(), [*POINTS, *others], tmp_path / "sweep", 1)
    assert [path.split("/")[-1] for path in reads] == ["prompts.jsonl"] * 2 + ["test_prompts.jsonl"]
    assert not (tmp_path / "sweep").exists()


def test_points_are_checked_as_runs_are(tmp_path, monkeypatch):
    """All of `preflight.check_named`, whatever is added to it."""
    monkeypatch.setattr(preflight, "check_writers", lambda writers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study.plan_sweep(settings(), POINTS, tmp_path, 1)
