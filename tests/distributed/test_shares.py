"""Processes side by side have equal parts of the machine, and none has what another has."""

import os

import pytest

from ppo_jax.distributed import shares
from ppo_jax.distributed.shares import divide, find_devices, keep_to


@pytest.fixture(autouse=True)
def five_cores(monkeypatch):
    monkeypatch.setattr(shares, "available_cores", lambda: [2, 3, 5, 7, 11])
    for name in shares.VISIBLE.values():
        monkeypatch.delenv(name, raising=False)


def test_cores_are_divided_and_each_process_has_all_devices_of_the_cpu():
    parts = divide("cpu", 8, 2)
    assert [part.cores for part in parts] == [(2, 5, 11), (3, 7)]
    assert [part.num_devices for part in parts] == [8, 8]
    assert divide("cpu", 1, 1) == [shares.Share(num_devices=1)]  # nothing is taken away


def test_gpus_are_divided_by_their_numbers(monkeypatch):
    shown = [part.environment["CUDA_VISIBLE_DEVICES"] for part in divide("gpu", 5, 2)]
    assert shown == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    shown = [part.environment["CUDA_VISIBLE_DEVICES"] for part in divide("gpu", 2, 2)]
    assert shown == ["4", "6"]


def test_chips_are_divided_with_their_arrangement():
    first, second = divide("tpu", 4, 2)
    assert first.environment == {
        "TPU_VISIBLE_CHIPS": "0,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    assert second.environment["TPU_VISIBLE_CHIPS"] == "2,3" and second.num_devices == 2
    with pytest.raises(ValueError, match=r"must give each one of \[1, 2, 4, 8\] chips, got 3"):
        divide("tpu", 6, 2)


@pytest.mark.parametrize(
    ("kind", "jobs", "told"),
    [
        ("cpu", 6, r"\[1, 5\], the cores of this machine, got 6"),
        ("cpu", 0, "got 0"),
        ("gpu", 3, r"\[1, 2\], the GPUs of this machine, got 3"),
        ("tpu", 3, "the TPUs of this machine"),
    ],
)
def test_more_processes_than_devices_are_refused(kind, jobs, told):
    with pytest.raises(ValueError, match=told):
        divide(kind, 2, jobs)


def test_accelerators_are_counted_by_a_process_that_ends(monkeypatch):
    monkeypatch.setattr(shares, "accelerators_may_be_used", lambda: True)
    monkeypatch.setattr(shares, "ASK", "print('a warning'); print('[\"gpu\", 3]')")
    assert find_devices() == ("gpu", 3)
    monkeypatch.setattr(shares, "ASK", "raise RuntimeError('no driver')")
    with pytest.raises(ValueError, match="jax finds no devices: RuntimeError: no driver"):
        find_devices()
    monkeypatch.setattr(shares, "accelerators_may_be_used", lambda: False)
    assert find_devices()[0] == "cpu"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are kept on Linux alone")
def test_a_process_keeps_to_its_cores():
    before = os.sched_getaffinity(0)
    try:
        keep_to([min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
