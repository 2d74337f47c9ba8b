"""What a stage prints while it runs: plain lines, and a bar on a terminal."""

import functools
import os
import pty
import sys

import jax.numpy as jnp

from ppo_jax.training import metrics as metrics_module
from ppo_jax.training.metrics import MetricsWriter


def printed(tmp_path, capsys, monkeypatch, *, total, seconds, restored_step=None):
    """The plain lines of a stage whose steps take so many seconds."""
    clock = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    writer = MetricsWriter(
        tmp_path,
        "ppo",
        total_steps=total,
        restored_step=restored_step,
        show={"reward/score_mean": "score", "kl/ref": "kl"},
    )
    for step in range((restored_step or 0) + 1, total + 1):
        clock[0] += seconds
        writer.write(step, {"kl/ref": jnp.float32(3.2), "reward/score_mean": 0.8125, "other": 1.0})
        writer.flush()
    writer.close()
    return capsys.readouterr().out.splitlines()


def test_plain_lines_come_about_every_tenth_of_the_steps(tmp_path, capsys, monkeypatch):
    lines = printed(tmp_path, capsys, monkeypatch, total=40, seconds=2)
    assert len(lines) == 10
    assert lines[2] == "ppo 12/40  score 0.812  kl 3.20  2.00 s/step  eta 0:56"
    assert lines[-1] == "ppo 40/40  score 0.812  kl 3.20  2.00 s/step  eta 0:00"


def test_slow_steps_are_reported_at_least_every_half_minute(tmp_path, capsys, monkeypatch):
    lines = printed(tmp_path, capsys, monkeypatch, total=100, seconds=15)
    assert len(lines) == 50
    assert lines[0] == "ppo 2/100  score 0.812  kl 3.20  15.0 s/step  eta 24:30"


def test_steps_to_come_are_not_expected_to_compile(tmp_path, capsys, monkeypatch):
    compiled = [7.0]
    monkeypatch.setattr(metrics_module, "compile_seconds", lambda: compiled[0])
    clock = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    writer = MetricsWriter(tmp_path, "ppo", total_steps=10, show={"kl/ref": "kl"})
    compiled[0], clock[0] = compiled[0] + 40, clock[0] + 43
    for step in (1, 2):
        writer.write(step, {"kl/ref": 3.2})
        writer.flush()
        clock[0] += 3
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "ppo 1/10  kl 3.20  3.00 s/step  eta 0:27",
        "ppo 2/10  kl 3.20  3.00 s/step  eta 0:24",
    ]


def test_progress_of_a_resumed_run_counts_its_own_steps(tmp_path, capsys, monkeypatch):
    lines = printed(tmp_path, capsys, monkeypatch, total=10, seconds=3, restored_step=8)
    assert lines[0] == "ppo 9/10  score 0.812  kl 3.20  3.00 s/step  eta 0:03"


INIT = metrics_module.tqdm.__init__


def every_time(bar, *args, **kwargs):
    """A bar that is drawn at every step, however soon."""
    INIT(bar, *args, **kwargs, mininterval=0, miniters=1)


def validated(tmp_path, total=20):
    """A stage that validates before its first step, at step 7 and at its last."""
    show = {"sft/loss": "loss", "sft/validation_loss": "validation"}
    writer = MetricsWriter(tmp_path, "sft", total_steps=total, show=show)
    writer.write(0, {"sft/validation_loss": 7.5})
    for step in range(1, total + 1):
        more = {"sft/validation_loss": step / 2} if step in (7, total) else {}
        writer.write(step, {"sft/loss": float(step)} | more)
    writer.close()


def test_a_validation_is_on_the_line_of_its_own_step_alone(tmp_path, capsys):
    validated(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sft 0/20  validation 7.50"
    with_it = [line.split("  ")[:3] for line in lines[1:] if "validation" in line]
    assert with_it == [
        ["sft 7/20", "loss 7.00", "validation 3.50"],
        ["sft 20/20", "loss 20.0", "validation 10.0"],
    ]
    assert [line.split()[1] for line in lines[1:5]] == ["2/20", "4/20", "6/20", "7/20"]


def test_a_bar_keeps_the_last_validation_and_says_of_which_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(metrics_module.tqdm, "__init__", functools.partialmethod(every_time))
    validated(tmp_path)
    shown = capsys.readouterr().out
    assert "loss 9.00  validation 3.50 (step 7)" in shown
    assert "loss 20.0  validation 10.0" in shown and "10.0 (step" not in shown


def test_a_stage_that_is_stopped_prints_its_last_step(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=100, show={"kl/ref": "kl"})
    for step in (1, 2, 3):
        writer.write(step, {"kl/ref": step / 4})
    writer.close()
    assert [line[:14] for line in capsys.readouterr().out.splitlines()] == ["ppo 3/100  kl "]


def test_a_terminal_shows_a_bar_with_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writer = MetricsWriter(tmp_path, "sft", total_steps=2, show={"sft/loss": "loss"})
    for step in (1, 2):
        writer.write(step, {"sft/loss": step / 4})
    writer.close()
    last = capsys.readouterr().out.split("\r")[-1]
    assert last.startswith("sft: 100%") and "2/2" in last and "loss 0.500" in last


def test_a_terminal_that_claims_no_width_shows_the_bar_all_the_same(tmp_path, monkeypatch):
    reader, terminal = pty.openpty()  # 0 columns wide, as those of some CI services
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(reader, "rb", buffering=0) as shown, os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "__stdout__", stdout)
        writer = MetricsWriter(tmp_path, "sft", total_steps=1, show={"sft/loss": "loss"})
        writer.write(1, {"sft/loss": 0.25})
        writer.close()
        stdout.flush()
        last = shown.read(10_000).decode().rstrip().split("\r")[-1]
    assert last.startswith("sft: 100%|") and "1/1" in last and "loss 0.250" in last
    assert len(last) == 80


def test_a_figure_that_is_zero_but_for_rounding_reads_as_zero(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=1, show={"kl/ref": "kl"})
    writer.write(1, {"kl/ref": -3.35e-08})
    writer.close()
    assert "  kl 0.000  " in capsys.readouterr().out
