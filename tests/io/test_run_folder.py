"""The files of a workdir: whole lines, a config that says what was run, and what changed in it."""

import json
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.io import run_folder as workdir_module
from ppo_jax.io.run_folder import (
    append_rows,
    config_differences,
    drop_lines_after,
    prepare_workdir,
    read_config,
    read_results,
    read_rows,
)
from ppo_jax.io.stage_folder import describe_stage


@pytest.mark.parametrize("torn", [b'{"stage": "ppo", "st', b'{"stage": "ppo", "step": 3}', b"\x00"])
def test_a_torn_last_line_is_removed_and_the_others_stay_byte_for_byte(tmp_path, torn):
    path = tmp_path / "samples.jsonl"
    whole = '{"stage":"ppo", "step":1,  "response": "ça\\n va"}\n{"step": 2, "stage": "sft"}\n'
    path.write_bytes(whole.encode() + torn)
    drop_lines_after(path, "ppo", 5)
    assert path.read_text(encoding="utf-8") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_damaged_line_in_the_middle_is_refused_by_its_number(tmp_path):
    path = tmp_path / "samples.jsonl"
    for damaged in ("{oops", "[1]", '{"stage": "ppo"}'):
        path.write_text(f'{{"stage": "ppo", "step": 1}}\n{damaged}\n')
        with pytest.raises(ValueError, match="samples.jsonl:2: must be a JSON object with stage"):
            drop_lines_after(path, "ppo", 5)


def test_dropping_lines_of_an_absent_file_does_nothing(tmp_path):
    drop_lines_after(tmp_path / "samples.jsonl", "ppo", 5)
    assert not list(tmp_path.iterdir())


def test_rows_are_appended_as_whole_lines_of_valid_json(tmp_path):
    path = tmp_path / "samples.jsonl"
    row = {"stage": "ppo", "step": 1, "prompt": "a\nb", "response": "é\u2028"}
    append_rows(path, [{**row, "score": np.float32(0.5)}, {**row, "score": float("nan")}])
    append_rows(path, [{**row, "score": jnp.float32(2)}])
    rows_read = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert rows_read == [{**row, "score": score} for score in (0.5, None, 2.0)]


def test_config_json_tells_what_was_run_and_on_what(tmp_path):
    config = {"ppo": {"kl_coef": 0.1, "eos_ids": (1, 2), "max_norm": float("inf")}, "seed": 0}
    prepare_workdir(tmp_path / "runs" / "a", config)
    text = (tmp_path / "runs" / "a" / "config.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["packages"]["jax"] == jax.__version__
    assert record["python"].count(".") == 2
    assert record["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert "git_commit" in record
    read = read_config(tmp_path / "runs" / "a")
    assert read == {"ppo": {"kl_coef": 0.1, "eos_ids": [1, 2], "max_norm": "inf"}, "seed": 0}
    assert config_differences(read, config) == []


def test_the_commit_is_the_one_of_the_checkout(tmp_path, monkeypatch):
    source = tmp_path / "checkout"
    (source / "ppo_jax" / "io").mkdir(parents=True)
    monkeypatch.setattr(
        workdir_module, "__file__", str(source / "ppo_jax" / "io" / "run_folder.py")
    )
    assert workdir_module._git_commit() is None

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        command = ["git", "-C", str(source), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert workdir_module._git_commit() is None  # no commit yet
    (source / "ppo_jax" / "metrics.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    assert workdir_module._git_commit() == git("rev-parse", "HEAD")
    (source / "ppo_jax" / "metrics.py").write_text("2")
    assert workdir_module._git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_workdir_without_a_config_has_none(tmp_path):
    assert read_config(tmp_path) is None and read_results(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"", "is not JSON: Expecting value"),
        (b"\xff", "is not JSON: 'utf-8' codec can't decode"),
        (b"[" * 10**5, "is not JSON: maximum recursion depth"),
        (b"[1]", r"must be a JSON object, got \[1\]"),
        (b"null", "must be a JSON object, got None"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, text, told):
    for name, read in (
        ("config.json", read_config),
        ("results.json", read_results),
        ("stage.json", describe_stage),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{tmp_path}/{name} {told}"):
            read(tmp_path)


STAGE = {"stage": "sft", "kind": "policy", "model": {}, "frozen": True, "settings": {}}
STAGE["num_steps"] = 3


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("config.json", {}, " must have the field config"),
        ("config.json", {"config": [1]}, r": config must be an object, got \[1\]"),
        ("config.json", {"config": {"ppo": "x"}}, ": config.ppo must be an object or null, got"),
        ("results.json", {"time/sft_s": "x"}, ": time/sft_s must be a number, got 'x'"),
        ("results.json", {"time/sft_s": 10**400}, ": time/sft_s must be a number, got 1000"),
        ("results.json", {"gold/a": True}, ": gold/a must be a number or null, got True"),
        ("results.json", {"gold/a_interval": [1]}, r": gold/a_interval must be two numbers, got"),
        ("results.json", {"judges": [1]}, r": judges must be a list of objects, got \[1\]"),
        ("results.json", {"judges": [{"mean_sft": "x"}]}, ": judges: mean_sft must be a number"),
        ("results.json", {"samples": [{"scores": {"a": "x"}}]}, ": samples: scores must be an"),
        ("results.json", {"evaluated": 1}, ": evaluated must be an object, got 1"),
        ("stage.json", {}, r" must be as a stage writes it, but lacks \['frozen', 'kind', 'model'"),
        ("stage.json", STAGE | {"num_steps": "3"}, ": num_steps must be a whole number, got '3'"),
        ("stage.json", STAGE | {"frozen": 1}, ": frozen must be true or false, got 1"),
        ("stage.json", STAGE | {"sources": {"a": "x"}}, ": sources must be an object of numbers"),
        ("stage.json", STAGE, ": model.vocab_size must be given"),
        ("stage.json", STAGE | {"model": {"vocab": 1}}, ": unknown setting model.vocab; did you"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, name, values, told):
    readers = {"config.json": read_config, "results.json": read_results}
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}{told}"):
        readers.get(name, describe_stage)(tmp_path)


def test_a_line_that_is_no_row_is_left_out_by_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"stage": "sft", "step": 1, "sft/loss": null, "mine": [], "ppo/row_fill": 0.5}'
    bad = {
        b"{": "Expecting property name",
        b"\xff": "'utf-8' codec can't decode",
        b"[1]": "it must be a JSON object",
        b'{"step": 1}': r"it lacks \['stage'\]",
        b'{"stage": "sft", "step": "1"}': "step must be a whole number, got '1'",
        b'{"stage": 1, "step": 1}': "stage must be a text, got 1",
        b'{"stage": "sft", "step": 1, "sft/loss": "low"}': "sft/loss must be a number or null, got",
        b'{"stage": "sft", "step": 1, "a/b": 1' + b"0" * 400 + b"}": "a/b must be a number or null",
    }
    path.write_bytes(b"\n".join([good, *bad, b"", good, b'{"torn": ']))
    rows, left_out = read_rows(path)
    row = {"stage": "sft", "step": 1, "sft/loss": None, "mine": [], "ppo/packing_efficiency": 0.5}
    assert rows == [row, row]
    for number, (told, line) in enumerate(zip(bad.values(), left_out, strict=True), 2):
        assert re.match(rf"metrics.jsonl:{number} \({told}", line), line
    path.rename(tmp_path / "samples.jsonl")
    assert read_rows(tmp_path / "samples.jsonl")[1][0].endswith("lacks ['prompt', 'response'])")
    assert read_rows(path) == ([], [])


def test_config_differences_name_every_field_that_changed():
    old = {"ppo": {"kl_coef": 0.1, "gamma": 1.0, "ids": [1]}, "data": {}, "a": None}
    new = {"ppo": {"kl_coef": 0.2, "gamma": 1.0, "ids": (1,)}, "data": {"path": "x"}, "a": None}
    assert config_differences(old, new) == [
        "ppo.kl_coef: 0.1 -> 0.2",
        "data: {} -> absent",
        "data.path: absent -> x",
    ]
