"""What process 0 does for all, what it chooses for all, and which rows are whose: in one start."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config.mesh import MeshSettings, RolloutRules
from ppo_jax.core.types import Prompts
from ppo_jax.data.prompts import PromptData
from ppo_jax.distributed.layout import Layout, fetch, make_mesh
from ppo_jax.distributed.processes import is_multiprocess, on_primary, preempted
from ppo_jax.inference.generate import BATCHES, generate
from ppo_jax.io import integrity as checksums
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo import call_functions
from ppo_jax.training.reward_functions import RewardFunction
from tests.support import two_processes
from tests.support.tiny_stage import random_model
from tests.support.tiny_state import flip_a_bit, largest_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_ROWS = 16


# --- what each of the two processes does ----------------------------------------------------------


def play(folder):
    """All scenes, and what this process found, in a file of its own."""
    found = {scene.__name__: scene(folder) for scene in SCENES}
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(found))


def raised(do, *args, **kwargs):
    """What a call raises, as text."""
    try:
        do(*args, **kwargs)
    except BaseException as error:
        return repr(error)
    return ""


def done_for_all(folder):
    calls = []
    answer = on_primary(lambda word: calls.append(word) or [jax.process_index(), word], "a")
    inside = on_primary(lambda: [is_multiprocess(), preempted(), on_primary(jax.process_index)])
    return {"answer": answer, "calls": calls, "inside": inside, "after": is_multiprocess()}


def failed_for_all(folder):
    def fail(error):
        raise error

    errors = [KeyError("lost"), SystemExit(7), KeyboardInterrupt("asked"), SystemExit(lambda: 0)]
    told = [raised(on_primary, fail, error) for error in errors]
    return {"raised": told, "no_value": raised(on_primary, lambda: lambda: 0)}


def different_calls(folder):
    return raised(on_primary, max if jax.process_index() == 0 else min, 1, 2)


def interrupted_while_it_waits(folder):
    if jax.process_index() == 1:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    told = raised(on_primary, time.sleep, 5)
    return [told, time.monotonic() - began]


def a_damaged_step(folder):
    layout = Layout(make_mesh(MeshSettings(data=8)))

    def state(step):
        numbers = np.random.default_rng(step).normal(size=(512, 32)).astype(np.float32)
        return {"w": layout.shard_batch(numbers)}

    def damage(step):
        on_primary(lambda: flip_a_bit(largest_file(folder / "steps" / str(step))))

    def rows(tree):
        return {"w": layout.batch_sharding}

    def first_number(array):
        return float(fetch(array)[0, 0])

    checkpoints = Checkpoints(folder / "steps")
    for step in (3, 6):
        checkpoints.save(step, state(step))
    checkpoints.close()
    save_params(folder / "params", state(1))
    damage(6)
    found, read, crc32 = {}, [], checksums._crc32
    checksums._crc32 = lambda path: read.append(path.name) or crc32(path)
    again = Checkpoints(folder / "steps")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        restored, step, _ = again.restore(state(0))
        found["restored"] = [step, first_number(restored["w"])]
        found["readable"] = again.readable_step()
        item = load_checkpoint_item(folder / "steps", "w", shardings=rows)
        found["item"] = first_number(item)
    found["warned"] = [str(x.message) for x in warned if "passed over" in str(x.message)]
    at = {"name": "w", "shardings": rows}
    item = load_checkpoint_item(folder / "steps", step=3, **at)
    found["item_of_step"] = first_number(item)
    found["damaged_item"] = raised(load_checkpoint_item, folder / "steps", step=6, **at)
    found["params"] = first_number(load_params(folder / "params", rows)["w"])
    found["alone"] = [
        raised(on_primary, load_params, folder / "params"),
        raised(on_primary, save_params, folder / "other", {"w": np.ones(2)}),
        raised(on_primary, again.save, 9, state(0)),
        raised(on_primary, fetch, state(0)),
    ]
    damage(3)
    found["all_damaged"] = [
        raised(again.restore, state(0)),
        raised(Checkpoints(folder / "steps").readable_step),
        raised(load_checkpoint_item, folder / "steps", **at),
    ]
    on_primary(lambda: flip_a_bit(largest_file(folder / "params")))
    found["damaged_params"] = raised(load_params, folder / "params", rows)
    checksums._crc32 = crc32
    return found | {"expected": [float(fetch(state(s)["w"])[0, 0]) for s in (3, 1)], "read": read}


def rows_of_a_reward_function(folder):
    """{mesh: (rows that this process scored, scores that it got, those of tokens)}."""
    devices = jax.devices()
    meshes = {
        "rows in eight": (MeshSettings(data=8), devices),
        "rows in two": (MeshSettings(data=2, model=4), devices),
        "whole rows": (MeshSettings(data=1, model=8), devices),
        "whole by rule": (MeshSettings(data=8, rules=RolloutRules(batch=())), devices),
        # Each row has a copy on both processes, the first one now on this, now on that.
        "mixed": (MeshSettings(data=4, model=2), [devices[i] for i in (0, 4, 5, 1, 2, 6, 7, 3)]),
    }
    tokenizer = vocabulary.train_tokenizer(["a film of few words"] * 3, 300)
    texts, every = [str(i) for i in range(NUM_ROWS)], np.arange(NUM_ROWS)
    ids = Prompts(tokens=np.zeros((NUM_ROWS, 1), int), mask=np.ones((NUM_ROWS, 1), bool))
    data = PromptData(texts=texts, prompts=ids, dropped={}, columns={"answer": texts[::-1]})
    found = {}
    for name, (settings, order) in meshes.items():
        layout, scored = Layout(make_mesh(settings, order), settings.rules), []
        score = RewardFunction("a:b", lambda p, r, scored=scored: scored.extend(p) or map_int(p))
        tokens = layout.shard_batch(np.full((NUM_ROWS, 3), 5, np.int32))
        mask = layout.shard_batch(np.ones((NUM_ROWS, 3), bool))
        rollout = types.SimpleNamespace(
            prompt_tokens=tokens, prompt_mask=mask, response_tokens=tokens, response_mask=mask
        )
        scores, each = call_functions([score], data, every, rollout, tokenizer, ())
        both = [RewardFunction("a:score", map_int_of), RewardFunction("a:each", three_each)]
        of_tokens, _ = call_functions(both, data, every, rollout, tokenizer, ())
        rows = [int(row) for row in scored]
        found[name] = [rows, scores.tolist(), float(each["reward/b"].mean()), of_tokens.tolist()]
    return found


def map_int(prompts):
    return [float(prompt) for prompt in prompts]


def map_int_of(prompts, responses, answer):
    return map_int(answer)


def three_each(prompts, responses):
    return [[float(prompt)] * 3 for prompt in prompts]


def arrays_of_its_own(folder):
    rows = Layout(make_mesh(MeshSettings(data=8))).shard_batch(np.arange(8))
    mixed = fetch({"several": rows, "one": jnp.arange(3), "numpy": np.arange(2), "number": 5})
    return [
        {name: np.asarray(leaf).tolist() for name, leaf in mixed.items()},
        on_primary(lambda: fetch(jnp.ones(2)).sum().item()),
    ]


SCENES = [
    done_for_all,
    failed_for_all,
    different_calls,
    interrupted_while_it_waits,
    a_damaged_step,
    rows_of_a_reward_function,
    arrays_of_its_own,
]


# --- what they found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Scene -> what process 0 and process 1 found."""
    folder = tmp_path_factory.mktemp("scenes")
    for code, output in two_processes.finish(two_processes.start(f"{__name__}:play", folder), 200):
        assert code == 0, output
    both = [json.loads((folder / f"{i}.json").read_text()) for i in (0, 1)]
    return {name: [x[name] for x in both] for name in both[0]}


@pytest.mark.slow
def test_process_0_does_it_once_and_all_have_what_it_gave(found):
    first, other = found["done_for_all"]
    assert first["answer"] == other["answer"] == [0, "a"]
    assert (first["calls"], other["calls"]) == (["a"], [])
    assert first["inside"] == other["inside"] == [False, False, 0]
    assert first["after"] and other["after"]


@pytest.mark.slow
def test_whatever_process_0_raises_the_others_are_told(found):
    first, other = found["failed_for_all"]
    *known, unpicklable = first["raised"]
    assert known == ["KeyError('lost')", "SystemExit(7)", "KeyboardInterrupt('asked')"]
    assert "SystemExit(<function" in unpicklable
    told = "ProcessMismatch('process 0 has failed, and says why')"
    assert other["raised"] == [told, "SystemExit(7)", told, "SystemExit(1)"]
    assert "pickle" in first["no_value"] and other["no_value"] == told


@pytest.mark.slow
def test_a_process_that_waits_for_another_call_says_which(found):
    first, other = found["different_calls"]
    assert first == "" and "process 1 waits for min, but process 0 has called max" in other


@pytest.mark.slow
def test_a_process_that_waits_hears_ctrl_c(found):
    (told, seconds), (interrupted, waited) = found["interrupted_while_it_waits"]
    assert told == "" and interrupted == "KeyboardInterrupt()"
    assert waited < 4 < seconds


@pytest.mark.slow
def test_all_pass_over_a_damaged_step_that_process_0_alone_has_read(found):
    first, other = found["a_damaged_step"]
    third, params = first["expected"]
    for mine in (first, other):
        assert mine["restored"] == [3, third] and mine["readable"] == 3
        assert mine["item"] == mine["item_of_step"] == third and mine["params"] == params
    assert len(first["warned"]) == 3 and all("/steps/6: OSError" in x for x in first["warned"])
    assert first["read"] and other["warned"] == other["read"] == []


@pytest.mark.slow
def test_process_0_says_what_is_damaged_and_the_others_end_as_well(found):
    first, other = found["a_damaged_step"]
    for name, what in (("damaged_item", "steps/6"), ("damaged_params", "params")):
        assert f"{what} cannot be read" in first[name] and "its checksum differs" in first[name]
    assert all("none of the checkpoints" in text for text in first["all_damaged"])
    told = "ProcessMismatch('process 0 has failed, and says why')"  # not of a checkpoint
    assert {other["damaged_item"], other["damaged_params"], *other["all_damaged"]} == {told}


@pytest.mark.slow
def test_what_is_done_together_is_not_done_by_process_0_alone(found):
    first, other = (x["alone"] for x in found["a_damaged_step"])
    for told, done in zip(first, ("loaded", "saved", "saved", "fetched"), strict=True):
        assert f"must be {done} by all processes, not by process 0 alone" in told
    assert all("process 0 has failed" in told for told in other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "of_process_0"),
    [
        ("rows in eight", range(8)),
        ("rows in two", range(8)),
        ("whole rows", range(16)),
        ("whole by rule", range(16)),
        ("mixed", [0, 1, 2, 3, 8, 9, 10, 11]),
    ],
)
def test_each_row_is_scored_once_wherever_its_copies_lie(found, mesh, of_process_0):
    first, other = (x[mesh] for x in found["rows_of_a_reward_function"])
    assert first[1:] == other[1:]
    (mine, scores, mean, of_tokens), (theirs, same_scores) = first, other[:2]
    assert mean == 7.5 and of_tokens == [[i, i, 15.0] for i in range(NUM_ROWS)]
    assert mine == list(of_process_0)
    assert theirs == [row for row in range(NUM_ROWS) if row not in mine]
    assert scores == same_scores == list(range(NUM_ROWS))


@pytest.mark.slow
def test_what_lies_on_one_process_is_fetched_without_the_others(found):
    mixed = {"several": list(range(8)), "one": [0, 1, 2], "numpy": [0, 1], "number": 5}
    assert found["arrays_of_its_own"] == [[mixed, 2.0]] * 2


# --- in one process -------------------------------------------------------------------------------


def test_one_process_does_it_and_raises_as_it_is():
    assert on_primary(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        on_primary(divmod, 7, 0)
    unpicklable = on_primary(lambda: lambda: 5)
    assert unpicklable() == 5 and not preempted()


def test_numbers_and_numpy_are_fetched_as_they_are():
    found = fetch([jnp.arange(2), np.arange(3), 5])
    assert [np.asarray(leaf).tolist() for leaf in found] == [[0, 1], [0, 1, 2], 5]


def test_generation_may_end_before_each_program():
    asked = []
    sampling = Sampling(response_length=2, eos_ids=(0,))
    how = {"sampling": sampling, "temperature": 1.0, "seed": 0, "max_prompt_length": 20}
    how |= {"batch_size": 2, "before_batch": lambda: asked.append(1)}
    generate(random_model(max_length=32), ["a film"] * (2 * 2 * BATCHES + 1), **how)
    assert len(asked) == 3


DEAF = """
import ctypes, signal, time
from ppo_jax.distributed.processes import end_on_second_signal
end_on_second_signal()
signal.signal(signal.SIGINT, lambda *_: None)  # as the first one of a stage
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
print("ready", flush=True)
while True:
    {busy}
"""
BUSY = {
    # The main thread in C, as in a compilation: no handler of Python's is called.
    "a call that no signal ends": "libc.pthread_mutex_lock(mutex)",
    "steps that take long": "time.sleep(600)",
}


@pytest.mark.parametrize("what", BUSY)
def test_a_second_signal_ends_a_process_whatever_it_is_doing(what):
    command = [sys.executable, "-c", DEAF.format(busy=BUSY[what])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # nothing ends at the first one
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert told.endswith("ended at once; the same command goes on from the last checkpoint\n")
