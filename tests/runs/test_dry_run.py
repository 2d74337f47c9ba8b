"""`--dry-run` shows the plan and the first examples, trains nothing and leaves nothing behind."""

import json
import os
import subprocess
import sys

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.data.records import write_jsonl
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.summary import stop_lines
from tests.support import tiny_run, xla_flags
from tests.support.tiny_stage import byte_tokenizer

# A config file that holds the tiny run with every section.
CONFIG = """
from ml_collections import config_dict
from tests.support import tiny_run

def get_config():
    return config_dict.ConfigDict(tiny_run.config())
"""
SFT = """\
sft: the loss is on what is ⟦marked⟧
  text 1: 8 tokens, 7 marked
    | the⟦ film is good and long .<|endoftext|>⟧
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of SFT alone; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder, only=["sft"])
    return folder


def files(folder):
    """Every file below a folder: its bytes, and when it was changed."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_dry_run_of_a_script_shows_every_stage_and_leaves_nothing(tmp_path):
    config, home = tmp_path / "config.py", tmp_path / "temporary"
    config.write_text(CONFIG)
    home.mkdir()
    command = [sys.executable, "experiments/rlhf.py", "--dry-run", f"--config={config}"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=tiny_run.ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(tiny_run.ROOT),
            "TMPDIR": str(home),
            "XLA_FLAGS": xla_flags.with_devices(1),
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py", "temporary"]
    assert not list(home.iterdir())
    out, data = done.stdout, tmp_path / "run" / "data"
    for line in (
        "  sft batch             8 texts, at most 384 tokens a step",
        "  sft steps             6, 1 passes over the data",
        "  reward steps          6, 1 passes over the data",
        f"sft.data: {data}/train_texts.jsonl: 48 read; 48 used",
        f"sft.validation_data: {data}/unseen_texts.jsonl: 16 read; 16 used",
        f"reward.data: {data}/train_ratings.jsonl: 48 read; 48 used",
        f"reward.reference_data: {data}/unseen_texts.jsonl: 16 read; 16 used",
        f"ppo.prompts: {data}/prompts.jsonl: 6 read; 6 used",
        f"evaluate.prompts: {data}/test_prompts.jsonl: 6 read; 6 used",
        "  rated 2, 1, 3: 8 tokens",
        "    | the film is⟦...⟧",
        "    | a film⟦...⟧",
        f"dry run: nothing is trained, nothing is written to {tmp_path / 'run'}",
    ):
        assert f"\n{line}\n" in out
    assert SFT in out and "report" not in out


def test_a_dry_run_reads_a_workdir_and_does_not_touch_it(finished, capsys):
    before = files(finished)
    pipeline.dry_run(tiny_run.config(), finished)
    assert files(finished) == before
    out = capsys.readouterr().out
    assert f"sft.data: {finished}/data/train_texts.jsonl: 48 read; 48 used\n" in out
    assert "ppo starts from       a policy model" in out


def test_only_the_stages_of_a_script_are_shown(finished, capsys):
    pipeline.dry_run(tiny_run.config(), finished, only=["reward"])
    out = capsys.readouterr().out
    assert "reward.data" in out and "sft.data" not in out and "ppo.prompts" not in out


@pytest.mark.parametrize("warmup_steps", [5, 6])
def test_a_warm_up_that_outlasts_its_stage_is_told(finished, capsys, warmup_steps):
    changes = {"optimizer": tiny_run.optimizer(warmup_steps=warmup_steps)}
    values = tiny_run.on_base(finished, sft=changes, ppo={"init_from": "base"})
    values["ppo"] |= {"reward_model": "", "reward_function": "tests.support.tiny_run:letters"}
    pipeline.dry_run(values, finished.parent / "other")
    out = capsys.readouterr().out
    told = "sft: warmup_steps=6, but the stage has 6 steps: the learning rate never reaches its"
    assert (told in out) == (warmup_steps == 6) and out.count("warmup_steps") <= 1
    assert "memory, critic" in out and "memory, reward model" not in out


def test_both_sides_of_a_preference_are_shown(finished, capsys):
    data = finished / "data" / "preferences.jsonl"
    changes = {"data": str(data), "format": "preferences", "validation_data": ""}
    values = tiny_run.on_base(finished, reward={"init_from": "base", **changes})
    pipeline.dry_run(values, finished.parent / "other")
    out = capsys.readouterr().out
    assert "prompt 1, response 1, better than 2" in out and "prompt 1, response 2: " in out
    assert "is⟦ good<|endoftext|>⟧\n" in out and "is⟦ bad<|endoftext|>⟧\n" in out
    assert not (finished.parent / "other").exists()


def test_what_a_run_refuses_a_dry_run_refuses_with_the_same_words(finished, tmp_path):
    values = tiny_run.config()
    values["seed"] = 1
    messages = []
    for start in (pipeline.run, pipeline.dry_run):
        with pytest.raises(ValueError, match="was begun with other settings: seed") as caught:
            start(values, finished)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    values = tiny_run.config()
    values["reward"]["format"] = "preferences"
    named = f"{tmp_path}/new/data/train_ratings.jsonl:1: the keys must be"
    with pytest.raises(ValueError, match=f"^{named}"):
        pipeline.dry_run(values, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_file_is_read_before_a_run_begins(finished, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 7}\n')
    for section, field in (("reward", "reference_data"), ("evaluate", "ratings")):
        values = json.loads(json.dumps(tiny_run.config()))
        values[section][field] = str(bad)
        with pytest.raises(ValueError, match=r"bad\.jsonl:\d: "):
            pipeline.run(values, tmp_path / "run")
        assert not (tmp_path / "run" / "sft").exists()


def test_a_batch_must_hold_whole_rankings(finished, tmp_path):
    path = tmp_path / "rankings.jsonl"
    rows = [{"prompt": f"the film {n}", "responses": ["good", "fine", "bad"]} for n in range(20)]
    write_jsonl(path, rows)
    changes = {"data": str(path), "format": "preferences", "validation_data": "", "batch_size": 8}
    values = tiny_run.on_base(finished, reward={"init_from": "base", **changes})
    values["reward"]["reference_data"] = ""
    with pytest.raises(ValueError, match="reward.batch_size must be a multiple of 3, the most"):
        pipeline.run(values, tmp_path / "run")
    values["reward"]["batch_size"] = 6
    pipeline.run(values, tmp_path / "run")
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert 0 <= rows[-1]["reward_model/validation_accuracy"] <= 1


def test_what_ends_a_response_is_shown_where_it_is_more_than_eos(finished, capsys):
    values = tiny_run.config()
    pipeline.dry_run(values, finished)
    assert "responses end with" not in capsys.readouterr().out
    values["ppo"]["stop_tokens"] = (".", "\n\nHuman:")
    pipeline.dry_run(values, finished.parent / "other")
    out = capsys.readouterr().out
    assert "responses end with    <|endoftext|>, ., the text '\\n\\nHuman:'\n" in out
    line = "ppo: responses may end with another token than <|endoftext|>, with which the reward "
    assert f"\n{line}model's texts end: it reads them at <|endoftext|>, put behind" in out
    values["ppo"]["score_at"] = "last"
    pipeline.dry_run(values, finished.parent / "other")
    assert f"\n{line}model's texts end: it reads them at their last" in capsys.readouterr().out


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "prompt", "stops", "told"),
    [
        (CHATML, ASKED, (), True),
        (CHATML, "hi", (), False),  # no chat
        (CHATML, ASKED, ("<|im_end|>",), False),
        (CHATML.replace("<|im_end|>", "<|endoftext|>"), ASKED, (), False),
        (CHATML.replace("<|im_end|>", "."), ASKED, (), False),  # no token of its own
        (None, ASKED, (), False),
        ("{{ raise_exception('no') }}", ASKED, (), False),
    ],
)
def test_a_turn_that_ends_with_no_stop_token_is_told(template, prompt, stops, told):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    values = tiny_run.config()["ppo"] | {"stop_tokens": stops}
    settings = from_config_dict({"model": {"path": "x"}, "ppo": values}).ppo
    lines = [x for x in stop_lines(settings, tokenizer, ["x", prompt]) if "turn" in x]
    assert len(lines) == told
    assert all("<|im_end|>" in line and "ppo.stop_tokens" in line for line in lines)
