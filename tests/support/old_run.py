"""A workdir that version 0.1 left in the middle of PPO, before its modules were in packages.

`run-0.1.tar.xz` was made in a checkout of commit 5dca01f, the last with flat modules, by

    PYTHONPATH=. python old_run.py FOLDER    # this file, copied there

It holds the workdir after 3 iterations, and as `continued.jsonl` the metrics of the next 3, with
settings that have other names today.
"""

import copy
import importlib
import json
import pathlib
import shutil
import sys
import tarfile

ARCHIVE = pathlib.Path(__file__).with_name("run-0.1.tar.xz")
STAGE = {
    "trainable": "1",
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
}
CONFIG = {
    "model": {
        "scratch": {
            "vocab_size": 300,
            "num_layers": 2,
            "embed_dim": 16,
            "num_heads": 2,
            "mlp_dim": 24,
            "max_length": 40,
        },
        "vocabulary_data": "{workdir}/data/texts.jsonl",
    },
    "ppo": STAGE
    | {
        "prompts": "{workdir}/data/prompts.jsonl",
        "init_from": "base",
        "reward_model": "",
        "reward_function": "old_run:letters",
        "value_trainable": "1",
        "value_learning_rate": 1e-2,
        "num_iterations": 3,
        "rollout_batch_size": 8,
        "num_epochs": 2,
        "num_minibatches": 2,
        "max_prompt_length": 24,
        "response_length": 8,
        "old_logprobs": "recompute",
        "importance_low": 0.0,
        "importance_high": 2.0,
        "slots": 4,
        "refill": 2,
        "num_samples": 2,
        "save_every": 3,
    },
}


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: the letters of a response."""
    return [float(sum(x.isalpha() for x in response)) for response in responses]


def settings(num_iterations: int, names: dict[str, str]) -> dict:
    """The config with so many iterations, and the settings under other names."""
    config = copy.deepcopy(CONFIG)
    config["ppo"]["num_iterations"] = num_iterations
    config["ppo"] = {names.get(name, name): value for name, value in config["ppo"].items()}
    return config


def make(folder: pathlib.Path):
    """Make the archive with version 0.1."""
    pipeline = importlib.import_module("ppo_jax.pipeline")
    texts = [
        f"a film of {x} words and {y} more" for x in "few many dull fine".split() for y in "abcd"
    ]
    data = folder / "run" / "data"
    data.mkdir(parents=True)
    for name, key in (("texts", "text"), ("prompts", "prompt")):
        lines = [json.dumps({key: text[: len(text) if key == "text" else 12]}) for text in texts]
        (data / f"{name}.jsonl").write_text("\n".join(sorted(set(lines))) + "\n")
    pipeline.run(settings(3, {}), folder / "run")
    shutil.copytree(folder / "run", folder / "whole")
    pipeline.run(settings(6, {}), folder / "whole")
    rows = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    (folder / "run" / "continued.jsonl").write_text("\n".join(rows[-3:]) + "\n")
    shutil.rmtree(folder / "run" / "tensorboard")
    (folder / "run" / "report.html").unlink()
    with tarfile.open(folder / ARCHIVE.name, "w:xz") as archive:
        archive.add(folder / "run", ".")


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]))
