"""A run from chats alone: every stage reads messages, from a file, a table and a hub."""

import copy
import datetime
import functools
import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from ppo_jax.config.run import ModelSettings, ScratchSettings
from ppo_jax.data.records import write_jsonl
from ppo_jax.io.base_model import prepare_base
from ppo_jax.io.stage_folder import load_model
from ppo_jax.io.tokenizers import load_tokenizer, with_chat
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.export import export_stage
from tests.support import tiny_run
from tests.support.chats import TOKENIZER, turns

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKED = [f"the {thing}" for thing in tiny_run.THINGS]


def make_model(folder):
    """A tiny model whose tokenizer has a chat template."""
    write_jsonl(folder / "words.jsonl", [{"text": text} for text, _ in tiny_run.sentences("train")])
    scratch = ScratchSettings(vocab_size=320, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48)
    settings = ModelSettings(scratch=scratch, vocabulary_data=str(folder / "words.jsonl"))
    prepare_base(settings, folder / "model", seed=0)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)


def test_the_template_and_its_date_are_those_that_the_run_began_with(tmp_path, monkeypatch):
    """A run on the next day goes on; another template and another date are told as such."""
    make_model(tmp_path)
    template, rows = tmp_path / "own.jinja", tmp_path / "chats.jsonl"
    template.write_text("Today is {{ strftime_now('%d %B %Y') }}.\n" + TEMPLATE)
    write_jsonl(rows, [{"messages": turns(x, "good", x, "fine")} for x in ASKED])
    changes = {"data": str(rows), "validation_data": str(rows), "batch_size": 2}
    values = tiny_run.on_base(tmp_path, sft=changes | {"max_length": 192, "num_epochs": 0.1})
    values["model"] = {"path": str(tmp_path / "model"), "chat_template": str(template)}

    def on(day):
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date(2024, 2, day)

        monkeypatch.setattr(pipeline.datetime, "date", Date)

    run = tmp_path / "run"
    on(9)
    pipeline.run(values, run)
    for file, keys in (("config.json", ["config"]), ("sft/stage.json", ["settings"])):
        kept = functools.reduce(dict.get, [*keys, "model"], json.loads((run / file).read_text()))
        assert kept["chat_date"] == "2024-02-09"
    on(10)
    pipeline.dry_run(values, run)
    (run / "config.json").unlink()
    pipeline.dry_run(values, run)
    dated = {**values, "model": values["model"] | {"chat_date": "2024-02-10"}}
    with pytest.raises(ValueError, match="sft was begun with another date .*, 2024-02-09, now it"):
        pipeline.dry_run(dated, run)
    template.write_text(template.read_text().replace("assistant: ", "robot: "))
    with pytest.raises(ValueError, match=f"template has changed since {run}/sft .*chat_template="):
        pipeline.dry_run(values, run)
    former = run / "sft" / "tokenizer" / "chat_template.jinja"
    pipeline.dry_run({**values, "model": values["model"] | {"chat_template": str(former)}}, run)
    export_stage(run, "sft", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == former.read_text()
    assert "strftime_now('%d %B %Y')" in former.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "own.jinja: No such file"),
        (b"\xff\xfe", "own.jinja: not text in UTF-8"),
        (b"{% for m in messages %}", "own.jinja: the chat template fails: TemplateSyntaxError"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused_at_the_start(tmp_path, text, message):
    tokenizer = copy.deepcopy(TOKENIZER)
    if text is not None:
        (tmp_path / "own.jinja").write_bytes(text)
    settings = ModelSettings(path="a", chat_template=str(tmp_path / "own.jinja"))
    with pytest.raises(ValueError, match=rf"^model\.chat_template: {tmp_path}/{message}"):
        with_chat(tokenizer, settings)
    values = tiny_run.config()
    values["model"]["chat_template"] = settings.chat_template
    if text is None or text[0] > 127:  # before anything is made
        with pytest.raises(ValueError, match=message):
            pipeline.run(values, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_date_that_is_none_is_refused():
    for date in ("2024-2-9", "today", "2024-02-30", "20240209"):
        with pytest.raises(ValueError, match="model.chat_date must be '' or a date"):
            ModelSettings(path="a", chat_date=date)


def test_every_stage_learns_from_chats(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    chats = [{"messages": turns(x, "good", x, "fine")} for x in ASKED for _ in range(2)]
    pairs = [{"chosen": turns(x, "good"), "rejected": turns(x, "bad"), "margin": 2} for x in ASKED]
    make_model(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write = pyarrow.parquet.write_table
    write(pyarrow.Table.from_pylist(chats), tmp_path / "owner" / "name" / "train.parquet")
    write(pyarrow.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    write_jsonl(tmp_path / "chats.jsonl", chats)
    values = tiny_run.on_base(
        tmp_path,
        sft={"data": "hub:owner/name", "validation_data": "chats.jsonl", "batch_size": 2},
        reward={"data": "pairs.parquet", "format": "preferences", "validation_data": ""},
        ppo={"prompts": "chats.jsonl", "num_iterations": 1, "max_prompt_length": 96},
    )
    values["model"] = {"path": str(tmp_path / "model"), "vocabulary_data": "chats.jsonl"}
    for stage in ("sft", "reward"):
        values[stage] |= {"max_length": 96, "num_epochs": 0.1}
    values["reward"] |= {"validation_fraction": 0.5, "batch_size": 2, "reference_data": ""}
    pipeline.run(values, tmp_path / "run")
    row = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    opened = f"user: {ASKED[0]}<|endoftext|>\nassistant: good<|endoftext|>\nuser: {ASKED[0]}"
    assert row["prompt"] == opened + "<|endoftext|>\nassistant: "
    assert load_model(tmp_path / "run" / "ppo").tokenizer.chat_template == TEMPLATE
    steps = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [  # of a batch of one pair, with the margin of its row
        (step["reward_model/loss"], math.log1p(math.exp(2 - step["reward_model/margin"])))
        for step in steps
        if "reward_model/loss" in step
    ]
    assert losses and all(got == pytest.approx(expected, rel=1e-4) for got, expected in losses)
