"""What users of a run of several processes write, and what goes wrong in it: functions for configs.

Where the environment has the variable `WAITS`, some of them say in the run's folder that they are
reached, and wait until they are told to go on.
"""

import os
import random
import time

import jax

from ppo_jax.evaluation.evaluate import JudgePanel
from tests.support import tiny_run

WAITS, CALLS = "PPO_JAX_TEST_WAITS", "PPO_JAX_TEST_CALLS"


def wait_if_asked(workdir):
    if WAITS in os.environ:
        (workdir / "reached").touch()
        while not (workdir / "go_on").exists():
            time.sleep(0.05)


def prepare(folder):
    tiny_run.prepare(folder)
    wait_if_asked(folder.parent)


def prepare_nothing(folder):
    raise SystemExit(7)


def judges(workdir):
    """A judge that says something else at every call, and keeps which process called it."""

    def moods(texts):
        with open(workdir / "judged.txt", "a") as file:
            file.write(f"{jax.process_index()}\n")
        return [random.random() for _ in texts]

    return JudgePanel(judges={"gold": moods})


def count_vowels(prompts, responses):
    return [float(sum(r.count(v) for v in "aeiou")) for r in responses]


def fails_on_process_1(prompts, responses):
    if jax.process_index() == 1:
        raise KeyError("no such word")
    return count_vowels(prompts, responses)


def hangs_on_process_1(prompts, responses):
    time.sleep(3600 * jax.process_index())
    return count_vowels(prompts, responses)


def sleeps(prompts, responses):
    time.sleep(0.4)
    return count_vowels(prompts, responses)


def tells(prompts, responses):
    """Keeps in the file `CALLS` which process called it, and with how many rows."""
    with open(os.environ[CALLS], "a") as file:
        file.write(f"{jax.process_index()} {len(responses)}\n")
    return count_vowels(prompts, responses)


def answers(prompts, responses, answer, finished):
    """1 for a response that has its row's answer in it, and half of it where it was cut off."""
    return [
        float(right in response) / (1 if done else 2)
        for response, right, done in zip(responses, answer, finished, strict=True)
    ]


def each_token(prompts, responses, response_tokens, answer):
    """A number a token: whether it is the row's."""
    return [
        [float(token == right) for token in tokens]
        for tokens, right in zip(response_tokens, answer, strict=True)
    ]


def no_column(prompts, responses, colour):
    return [0.0] * len(responses)
