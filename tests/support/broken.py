"""What a user has, whole: a model, data, two finished stages; and ways to break a copy of it."""

import ast
import dataclasses
import json
import pathlib
import shutil

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from ppo_jax.config.run import ModelSettings, ScratchSettings
from ppo_jax.io import base_model
from tests.support import tiny_run
from tests.support.command_line import ROOT, run_script

# Flags with which each script runs; `{base}`, `{data}` ... are the places below.
GOOD = {
    "train_sft": [
        "--config={root}/configs/sft.py",
        "--workdir={tmp}/run",
        "--config.model.path={base}",
        "--config.sft.data={texts}",
        "--config.sft.trainable=1",
        "--config.sft.num_epochs=0.1",
        "--config.sft.batch_size=8",
        "--config.sft.max_length=48",
    ],
    "train_reward": [
        "--config={root}/configs/reward.py",
        "--workdir={tmp}/run",
        "--config.model.path={base}",
        "--config.reward.data={data}/preferences.jsonl",
        "--config.reward.trainable=1",
        "--config.reward.num_epochs=0.01",
        "--config.reward.batch_size=8",
        "--config.reward.max_length=48",
    ],
    "train_ppo": [
        "--config={root}/configs/ppo.py",
        "--workdir={tmp}/run",
        "--config.model.path={base}",
        "--config.ppo.prompts={data}/prompts.jsonl",
        "--config.ppo.reward_model={reward}",
        "--config.ppo.max_prompt_length=24",
        "--config.ppo.response_length=8",
    ],
    "rlhf": ["--config={tmp}/config.py", "--workdir={tmp}/run"],
    "generate": ["--model={base}", "--prompt=the film is", "--response_length=2"],
}


@dataclasses.dataclass(frozen=True)
class Places:
    """The folders that flags and messages name."""

    world: pathlib.Path  # what is whole, and stays so
    tmp: pathlib.Path  # of one test; {tmp}/run is the workdir

    def fill_in(self, text: str) -> str:
        places = {
            "root": ROOT,
            "tmp": self.tmp,
            "lines": self.tmp / "lines",
            "model": self.tmp / "model",
            "base": self.world / "base",
            "data": self.world / "data",
            "texts": self.world / "data" / "train_texts.jsonl",
            "sft": self.world / "sft_run" / "sft",
            "reward": self.world / "reward_run" / "reward",
        }
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text

    def flags(self, script: str, *more: str, without: str = "") -> list[str]:
        """The good flags of a script but for one, with others in their places or behind them."""
        by_name = {flag.partition("=")[0]: flag for flag in (*GOOD[script], *more)}
        by_name.pop(without, None)
        return [self.fill_in(flag) for flag in by_name.values()]


def make_world(folder: pathlib.Path):
    """A model, its data, and the stages SFT and reward, made by the scripts themselves."""
    tiny_run.prepare(folder / "data")
    (folder / "base").mkdir()
    sizes = dict(vocab_size=320, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, max_length=48)
    settings = ModelSettings(scratch=ScratchSettings(**sizes), vocabulary_data="texts")
    texts = [text for text, _ in tiny_run.sentences("train")]
    base_model.scratch_model(settings, folder / "base", texts, seed=0)
    for stage in ("sft", "reward"):
        run = f"--workdir={folder / stage}_run"
        ended = run_script(f"train_{stage}", *Places(folder, folder).flags(f"train_{stage}", run))
        assert ended.code == 0, ended.err


# --- what is wrong besides the flags --------------------------------------------------------------

CONFIG = """from ppo_jax.config import with_defaults

def get_config():
    return with_defaults({values!r})
"""


def write_config(places: Places, changes: dict):
    """A config of all stages as {tmp}/config.py; `changes` by section, None takes one out."""
    sections = {name: {} for name in ("sft", "reward", "ppo", "evaluate")}
    values = tiny_run.on_base(places.world, **sections)
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
        if value is None:
            del values[name]
    (places.tmp / "config.py").write_text(CONFIG.format(values=values))


def edit_json(path: pathlib.Path, changes: dict):
    """Some keys of a JSON file changed, or removed by None."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in values.items() if x is not None}))


def edit_weights(model: pathlib.Path, **changes: np.ndarray | None):
    """Tensors of a model by the last part of their names, changed, or removed by None."""
    names = {"norm": "model.norm.weight", "embed": "model.embed_tokens.weight"}
    names["more"] = "model.more"
    tensors = load_file(model / "model.safetensors")
    tensors |= {names[name]: array for name, array in changes.items()}
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, model / "model.safetensors")


def pickle(model: pathlib.Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lose_a_shard(model: pathlib.Path):
    (model / "model.safetensors").rename(model / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def forget_the_end(model: pathlib.Path):
    edit_json(model / "config.json", {"eos_token_id": None})
    edit_json(model / "tokenizer_config.json", {"eos_token": None})


def lose_tokens(model: pathlib.Path):
    edit_json(model / "config.json", {"vocab_size": 100})
    edit_weights(model, embed=np.zeros((100, 32), np.float32))


def use_words(model: pathlib.Path):
    """A tokenizer that is not made of bytes."""
    backend = Tokenizer(WordLevel({"<|endoftext|>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(model / "tokenizer.json"))


OF_MODEL = {
    "no config.json": lambda model: (model / "config.json").unlink(),
    "no model.safetensors": lambda model: (model / "model.safetensors").unlink(),
    "pickled weights": pickle,
    "a shard is missing": lose_a_shard,
    "no tokenizer.json": lambda model: (model / "tokenizer.json").unlink(),
    "no end of sequence": forget_the_end,
    "fewer tokens than the tokenizer": lose_tokens,
    "words": use_words,
    "weights without a norm": lambda model: edit_weights(model, norm=None),
    "weights with more": lambda model: edit_weights(model, more=np.zeros(1, np.float32)),
    "weights of another shape": lambda model: edit_weights(model, norm=np.zeros(3, np.float32)),
    "weights as integers": lambda model: edit_weights(model, norm=np.zeros(32, np.int8)),
}


def write_gguf(places: Places, architecture: str):
    """A GGUF file of nothing."""
    writer = gguf.GGUFWriter(places.tmp / "model.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def halve_a_stage(places: Places):
    shutil.copytree(places.world / "sft_run" / "sft", places.tmp / "half")
    edit_json(places.tmp / "half" / "stage.json", {"num_steps": 99})


def begin_with_other_data(places: Places):
    shutil.copytree(places.world / "sft_run", places.tmp / "run")
    changes = {"num_steps": 99, "data": {"rows": 9, "crc32": 1}}
    edit_json(places.tmp / "run" / "sft" / "stage.json", changes)


OF_JSON = {
    "torn": '{"a\n',
    "empty": "{}",
    "listed": "[1]",
    "nested": "[" * 10**5,
    "wrong": '{"time/sft_s": "long"}',
}
OF_PLACES = {
    "a run begun with other data": begin_with_other_data,
    "a file as workdir": lambda places: (places.tmp / "run").write_text("notes"),
    "half a stage": halve_a_stage,
    "a slip in a module": lambda places: (places.tmp / "slipped.py").write_text("def score(:\n"),
    "no GGUF": lambda places: (places.tmp / "model.gguf").write_bytes(b"GGUF" * 9),
    "GGUF of another architecture": lambda places: write_gguf(places, "mamba"),
    "GGUF without metadata": lambda places: write_gguf(places, "llama"),
}


def make(places: Places, what: str):
    """Bring about what a row of `mistakes` names behind its #."""
    kind, _, rest = what.partition(" ")
    if kind == "config":
        write_config(places, ast.literal_eval(rest))
    elif kind == "code":
        (places.tmp / "config.py").write_text(rest.replace(r"\n", "\n") + "\n")
    elif kind.startswith("lines"):
        (places.tmp / kind).write_bytes(rest.replace(r"\n", "\n").encode("latin-1"))
    elif kind == "ratings":
        (places.tmp / "lines").write_text(f'{{"text": "a", "ratings": {rest}}}\n')
    elif kind in ("config.json", "torn") or what in OF_MODEL:
        model = pathlib.Path(shutil.copytree(places.world / "base", places.tmp / "model"))
        if kind == "config.json":
            edit_json(model / "config.json", ast.literal_eval(rest))
        elif kind == "torn":
            (model / rest).write_text('{"a')
        else:
            OF_MODEL[what](model)
    elif what.startswith("a finished run"):
        run = pathlib.Path(shutil.copytree(places.world / "sft_run", places.tmp / "run"))
        if " with " in what:
            _, state, name = what.rpartition(" with ")[2].split()
            (run / name).write_text(OF_JSON[state])
    elif what:
        OF_PLACES[what](places)


# --- what is there before and after ---------------------------------------------------------------


def tree(folder: pathlib.Path) -> dict[str, bytes | None]:
    """All that a folder holds: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def dates(folder: pathlib.Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
