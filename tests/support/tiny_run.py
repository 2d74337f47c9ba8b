"""A whole run in seconds: its data, its config, its judges, and a process that can be stopped.

python -m tests.support.tiny_run '{"model": ...}' WORKDIR STAGE
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax

from ppo_jax.data.records import write_jsonl
from ppo_jax.evaluation.evaluate import JudgePanel
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training.stage import StageRun
from tests.support import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOOD = ["good", "fine", "great", "lovely"]
BAD = ["bad", "dull", "awful", "poor"]
THINGS = ["film", "plot", "cast", "music", "story", "end"]
STALLED = "stalled"  # a file in the workdir, made by a process that waits
STALL_AT = 4  # steps: between the checkpoints of steps 3 and 6


def sentences(part):
    """(text, ratings) of 48 sentences to train with, or of 16 others."""
    words = [
        (word, 1 if word in GOOD else -1) for pair in zip(GOOD, BAD, strict=True) for word in pair
    ]
    rows = [
        (f"the {thing} is {word}{end}", [2.0 * sign, 1.0 * sign, 3.0 * sign])
        for end in (" and long .", " .", "")
        for thing in THINGS
        for word, sign in words
    ]
    return rows[:48] if part == "train" else rows[48:64]


def prepare(folder):
    """Every kind of data file that a config can name."""
    for part in ("train", "unseen"):
        rows = sentences(part)
        write_jsonl(folder / f"{part}_texts.jsonl", [{"text": text} for text, _ in rows])
        write_jsonl(folder / f"{part}_ratings.jsonl", [{"text": t, "ratings": r} for t, r in rows])
    halves = [text.rsplit(" is ", 1) for text, _ in sentences("train")]
    rows = [{"prompt": f"{start} is", "completion": f" {end}"} for start, end in halves]
    write_jsonl(folder / "completions.jsonl", rows)
    pairs = [
        {"prompt": f"the {thing} is", "chosen": f" {good}", "rejected": f" {bad}"}
        for thing in THINGS
        for good in GOOD
        for bad in BAD
    ]
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"the {thing} is"} for thing in THINGS])
    write_jsonl(folder / "test_prompts.jsonl", [{"prompt": f"a {thing}"} for thing in THINGS])


def optimizer(**changes):
    return {"learning_rate": 1e-2, "schedule": "linear", **changes}


def config():
    """All stages, six steps each with a checkpoint every three; the top layer alone is trained."""
    return {
        "prepare": "tests.support.tiny_run:prepare",
        "model": {
            "scratch": {
                "vocab_size": 320,
                "num_layers": 2,
                "embed_dim": 32,
                "num_heads": 2,
                "mlp_dim": 48,
                "max_length": 48,
            },
            "vocabulary_data": "{workdir}/data/train_texts.jsonl",
        },
        "sft": {
            "data": "{workdir}/data/train_texts.jsonl",
            "validation_data": "{workdir}/data/unseen_texts.jsonl",
            "trainable": "1",
            "batch_size": 8,
            "max_length": 48,
            "eval_every": 2,
            "save_every": 3,
            "optimizer": optimizer(),
        },
        "reward": {
            "data": "{workdir}/data/train_ratings.jsonl",
            "format": "ratings",
            "validation_data": "{workdir}/data/unseen_ratings.jsonl",
            "reference_data": "{workdir}/data/unseen_texts.jsonl",
            "trainable": "1",
            "batch_size": 8,
            "pairs_per_batch": 16,
            "max_length": 48,
            "eval_every": 2,
            "save_every": 3,
            "optimizer": optimizer(),
        },
        "ppo": {
            "prompts": "{workdir}/data/prompts.jsonl",
            "trainable": "1",
            "value_trainable": "1",
            "num_iterations": 6,
            "rollout_batch_size": 8,
            "num_epochs": 2,
            "num_minibatches": 2,
            "max_prompt_length": 24,
            "response_length": 8,
            "kl_control": "adaptive",
            "sample_every": 2,
            "num_samples": 3,
            "save_every": 3,
            "value_learning_rate": 1e-2,
            "optimizer": optimizer(),
        },
        "evaluate": {
            "prompts": "{workdir}/data/test_prompts.jsonl",
            "judges": "tests.support.tiny_run:judges",
            "num_prompts": 6,
            "batch_size": 4,
        },
    }


def on_base(workdir, **sections):
    """A config that starts from a finished run's base model and reads its data."""
    values = config()
    values["model"] = {"path": str(workdir / "base")}
    values = {name: values[name] for name in ("model", *sections)}
    for name, changes in sections.items():
        values[name].update(changes)
    return json.loads(json.dumps(values).replace("{workdir}/data", str(workdir / "data")))


def judges(workdir):
    """One judge: how many good words a text has more than bad ones."""
    assert (workdir / "ppo").is_dir()

    def words(texts):
        return [
            float(
                sum(text.count(good) - text.count(bad) for good, bad in zip(GOOD, BAD, strict=True))
            )
            for text in texts
        ]

    return JudgePanel(judges={"gold": words}, notes={"gold": "counts words"})


def letters(prompts, responses):
    """A reward: the letters of a response."""
    assert all(isinstance(text, str) for text in prompts + responses)
    return [float(sum(character.isalpha() for character in text)) for text in responses]


def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def start(settings, workdir, stall="none"):
    """A process that runs the config, and stops to wait for a signal at step 4 of a stage."""
    command = [
        sys.executable,
        "-m",
        "tests.support.tiny_run",
        json.dumps(settings),
        str(workdir),
        stall,
    ]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": xla_flags.with_devices(1),  # as many as the runs in this process have
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | compiled,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main(settings, workdir, stall):
    end_step = StageRun.end_step

    def wait_at_the_step(self, step, state, metrics):
        end_step(self, step, state, metrics)
        if (self.stage, step) == (stall, STALL_AT):
            (self.workdir / STALLED).touch()
            while not self.asked_to_stop:
                time.sleep(0.02)

    StageRun.end_step = wait_at_the_step
    pipeline.run(json.loads(settings), workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
