"""What the files of a run hold after each step, after a kill, and after a divergence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from ppo_jax.io.run_folder import append_rows, prepare_workdir
from ppo_jax.training import metrics as metrics_module
from ppo_jax.training.metrics import MetricsWriter

OWN_TIMES = ("time/step_s", "time/compile_s")  # that no test knows beforehand


def rows(path):
    """The lines of a file without the time of a step, which is another every time."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OWN_TIMES} for row in found]


def steps(path, stage="ppo"):
    return [row["step"] for row in rows(path) if row["stage"] == stage]


def events(folder):
    """(purge steps, {tag: {step: value}}) of all event files, read without TensorBoard."""
    purges, scalars = [], {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                purges.append(event.step)
            for value in event.summary.value:
                if value.tag in OWN_TIMES:
                    continue
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return purges, scalars


def test_metrics_are_written_one_step_late_and_in_order(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=3)
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        writer.write(step, {"kl/ref": jnp.float32(step) / 2, "time/rollout_s": 0.25})
        assert (steps(path) if path.exists() else []) == list(range(1, step))
    writer.close()
    assert rows(path) == [
        {"stage": "ppo", "step": step, "kl/ref": step / 2, "time/rollout_s": 0.25}
        for step in (1, 2, 3)
    ]


def test_one_fetch_a_step_passes_a_strict_transfer_guard(tmp_path, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(set(x)) or device_get(x))
    values = {"a": jnp.float32(1), "b": jnp.bfloat16(2), "c": jnp.int32(3)}
    with jax.transfer_guard("disallow"):
        writer = MetricsWriter(tmp_path, "sft", total_steps=1)
        writer.write(1, values)
        assert not fetched
        writer.close()
    assert fetched == [{"a", "b", "c"}]
    assert rows(tmp_path / "metrics.jsonl") == [{"stage": "sft", "step": 1, "a": 1, "b": 2, "c": 3}]


def test_a_step_lasts_from_the_metrics_before_it_to_its_own(tmp_path, monkeypatch):
    clock = [50.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: clock[0])
    writer = MetricsWriter(tmp_path, "ppo", total_steps=2, tokens=("response/length", 64))
    for step, seconds in ((0, 9.0), (1, 4.0), (2, 8.0)):
        clock[0] += seconds
        writer.write(step, {"response/length": 10.0} if step else {"score": 1.0})
        writer.flush()
    writer.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("time/step_s") for row in found] == [None, 4.0, 8.0]
    assert [row.get("time/tokens_per_s") for row in found] == [None, 160.0, 80.0]


def test_seconds_of_compiling_are_told_apart(tmp_path, monkeypatch):
    compiled = [7.0]
    monkeypatch.setattr(metrics_module, "compile_seconds", lambda: compiled[0])
    writer = MetricsWriter(tmp_path, "ppo", total_steps=4)
    for step, seconds in enumerate((0.25, 0.25, 2.5, 0.0), start=1):
        compiled[0] += seconds
        writer.write(step, {"x": 1.0})
    writer.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("time/compile_s") for row in found] == [0.5, 2.5, None, None]


def test_what_was_compiled_before_the_first_step_is_not_in_its_seconds(tmp_path, monkeypatch):
    compiled = [7.0]
    monkeypatch.setattr(metrics_module, "compile_seconds", lambda: compiled[0])
    writer = MetricsWriter(tmp_path, "sft", total_steps=2)
    for step, seconds in enumerate((10.0, 0.75, 0.0)):
        compiled[0] += seconds
        writer.write(step, {"x": 1.0})
        writer.flush()
    writer.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("time/compile_s") for row in found] == [None, 0.75, None]


def test_flush_writes_what_is_held_back_once(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=2)
    writer.write(1, {"x": 1.0})
    writer.flush()
    writer.flush()
    assert steps(tmp_path / "metrics.jsonl") == [1]
    writer.close()
    assert steps(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize("value, text", [(jnp.nan, "nan"), (jnp.inf, "inf"), (-jnp.inf, "-inf")])
def test_a_loss_that_is_not_finite_stops_the_run_after_it_is_logged(tmp_path, value, text):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=9)
    writer.last_checkpoint = 5
    writer.write(7, {"policy/loss": jnp.float32(value), "kl/ref": 1.0})
    message = f"policy/loss is {text} at step 7; last checkpoint 5"
    with pytest.raises(FloatingPointError, match=f"^{message}$"):
        writer.write(8, {"policy/loss": 0.0})
    row = {"stage": "ppo", "step": 7, "policy/loss": None, "kl/ref": 1.0}
    assert rows(tmp_path / "metrics.jsonl") == [row]
    writer.close()


def test_a_metric_above_its_limit_stops_the_run_as_a_divergence_does(tmp_path):
    limits = {"kl/ref": (6.0, "ppo.max_ref_kl"), "x": (1.0, "x")}
    writer = MetricsWriter(tmp_path, "ppo", total_steps=9, limits=limits)
    writer.last_checkpoint = 5
    writer.write(6, {"kl/ref": 6.0})
    writer.write(7, {"kl/ref": jnp.float32(6.25)})
    message = r"kl/ref is 6.25, above ppo.max_ref_kl=6, at step 7; last checkpoint 5"
    with pytest.raises(FloatingPointError, match=f"^{message}$"):
        writer.flush()
    assert [row["kl/ref"] for row in rows(tmp_path / "metrics.jsonl")] == [6.0, 6.25]
    writer.close()


def test_a_divergence_before_the_first_checkpoint_says_so(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=9)
    writer.write(1, {"policy/loss": jnp.nan, "value/loss": jnp.inf})
    message = "policy/loss is nan, value/loss is inf at step 1; no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        writer.close()


def test_the_restored_step_is_the_last_checkpoint_of_a_resumed_run(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=9, restored_step=0)
    writer.write(1, {"loss": np.nan})
    with pytest.raises(FloatingPointError, match="loss is nan at step 1; last checkpoint 0"):
        writer.flush()
    writer.close()


def test_nan_in_another_metric_is_null_and_does_not_stop(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=1)
    writer.write(1, {"value/explained_variance": jnp.nan, "loss_scale": np.inf, "x": 1.0})
    writer.close()
    row = {"stage": "ppo", "step": 1, "value/explained_variance": None, "loss_scale": None}
    assert rows(tmp_path / "metrics.jsonl") == [{**row, "x": 1.0}]
    assert events(tmp_path / "tensorboard" / "ppo")[1] == {"x": {1: 1.0}}


def test_a_metric_that_is_no_scalar_is_refused_by_name(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=1)
    writer.write(1, {"kl/ref": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"metric 'kl/ref' must be a scalar, got shape \(3,\)"):
        writer.close()


def test_tensorboard_holds_the_same_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo", total_steps=2)
    for step in (1, 2):
        writer.write(step, {"kl/ref": step / 4})
    writer.close()
    _, scalars = events(tmp_path / "tensorboard" / "ppo")
    assert scalars == {"kl/ref": {1: 0.25, 2: 0.5}}


def test_a_resumed_run_drops_its_later_lines_and_no_others(tmp_path):
    for stage, last in (("sft", 4), ("ppo", 5)):
        writer = MetricsWriter(tmp_path, stage, total_steps=6)
        for step in range(1, last + 1):
            writer.write(step, {"x": float(step)})
        writer.close()
    writer = MetricsWriter(tmp_path, "ppo", total_steps=6, restored_step=3)
    path = tmp_path / "metrics.jsonl"
    assert steps(path) == [1, 2, 3] and steps(path, "sft") == [1, 2, 3, 4]
    for step in (4, 5, 6):
        writer.write(step, {"x": step * 10.0})
    writer.close()
    assert [row["x"] for row in rows(path) if row["stage"] == "ppo"] == [1, 2, 3, 40, 50, 60]
    purges, scalars = events(tmp_path / "tensorboard" / "ppo")
    assert purges == [0, 4]  # TensorBoard forgets steps 4 and 5 of the first file
    assert len(list((tmp_path / "tensorboard" / "ppo").iterdir())) == 2
    assert scalars["x"] == {1: 1, 2: 2, 3: 3, 4: 40, 5: 50, 6: 60}


def test_a_run_that_starts_again_from_nothing_drops_all_its_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"stage": "ppo", "step": 0}, {"stage": "sft", "step": 9}])
    MetricsWriter(tmp_path, "ppo", total_steps=1).close()
    assert rows(path) == [{"stage": "sft", "step": 9}]


def test_other_processes_write_nothing_but_stop_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    prepare_workdir(tmp_path / "run", {"seed": 0})
    append_rows(tmp_path / "samples.jsonl", [{"step": 1}])
    writer = MetricsWriter(tmp_path, "ppo", total_steps=2)
    writer.write(1, {"x": 1.0})
    writer.write(2, {"policy/loss": jnp.nan})
    with pytest.raises(FloatingPointError):
        writer.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
