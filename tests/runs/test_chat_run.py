"""A run from chats alone: every stage reads messages, from a file, a table and a hub."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ppo_jax.config.run import ModelSettings, ScratchSettings
from ppo_jax.data.records import write_jsonl
from ppo_jax.io.base_model import prepare_base
from ppo_jax.io.stage_folder import load_model
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.chats import turns

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


def test_every_stage_learns_from_chats(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    chats = [{"messages": turns(x, "good", x, "fine")} for x in ASKED for _ in range(2)]
    pairs = [{"chosen": turns(x, "good"), "rejected": turns(x, "bad")} for x in ASKED]
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
