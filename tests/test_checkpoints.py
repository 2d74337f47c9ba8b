"""What was saved comes back bit for bit, or is passed over by name, however the process ended."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params

UNFINISHED = ".orbax-checkpoint-tmp"


@flax.struct.dataclass
class State:
    policy_params: dict
    opt_state: optax.OptState
    kl_coef: jax.Array
    step: jax.Array


def make_state(seed=0, width=4):
    """Every kind of node and dtype that a run has: optax tuples, empty ones, bf16, int32."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": {"tokens": jax.random.normal(keys[0], (500, width))},
        "layers": {"0": {"kernel": jax.random.normal(keys[1], (width, 3), jnp.bfloat16)}},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    updates, opt_state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return State(params, opt_state, jnp.float32(0.1) + seed, jnp.int32(seed))


def assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_steps(directory):
    return sorted(path.name for path in directory.iterdir())


def save_all(directory, steps, keep=2):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"seed": step})
    checkpoints.close()


def restore(directory, example=None):
    return Checkpoints(directory).restore(make_state() if example is None else example)


def test_a_state_comes_back_bit_for_bit_with_its_step_and_metadata(tmp_path):
    save_all(tmp_path, [7])
    state, step, metadata = restore(tmp_path)
    assert_identical(state, make_state(7))
    assert (step, metadata) == (7, {"seed": 7})


def test_an_abstract_example_is_as_good_as_arrays(tmp_path):
    save_all(tmp_path, [7])
    state, _, _ = restore(tmp_path, jax.eval_shape(make_state))
    assert_identical(state, make_state(7))


def test_special_floats_keep_their_bits(tmp_path):
    values = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38], np.float32)
    values = np.append(values, np.array([0x7FC00123, 0xFF800001], np.uint32).view(np.float32))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": values})
    checkpoints.close()
    state, _, _ = checkpoints.restore({"x": values})
    assert np.asarray(state["x"]).tobytes() == values.tobytes()


def test_an_empty_folder_restores_to_nothing(tmp_path):
    assert restore(tmp_path / "absent") is None
    assert Checkpoints(tmp_path).latest_step() is None


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        state = {"w": jnp.full((1000, 1000), step, jnp.float32)}
        checkpoints.save(step, state)
        overwritten = overwrite(state)
        assert state["w"].is_deleted()  # really donated: no view of the buffer is left in the save
        jax.block_until_ready(overwritten)
        checkpoints.wait()
        saved, _, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
        assert (np.asarray(saved["w"]) == step).all()


def test_a_numpy_leaf_may_be_written_to_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    leaf = np.ones((500, 500), np.float32)
    checkpoints.save(1, {"x": leaf})
    leaf[:] = 2
    checkpoints.close()
    assert (load_checkpoint_item(tmp_path, "x") == 1).all()


def test_saving_and_restoring_pass_a_strict_transfer_guard(tmp_path):
    state = make_state(1)
    with jax.transfer_guard("disallow"):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state)
        checkpoints.close()
        restored, _, _ = checkpoints.restore(state)
    assert_identical(restored, state)


def test_shardings_of_the_example_are_respected_on_another_mesh(tmp_path):
    def sharded(shape, spec):
        mesh = jax.make_mesh(shape, ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jax.device_put(values, sharded((4, 2), ("data", "model")))})
    checkpoints.close()
    target = sharded((2, 4), (None, "model"))
    example = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}
    state, _, _ = checkpoints.restore(example)
    assert state["w"].sharding == target
    np.testing.assert_array_equal(state["w"], values)


def test_keep_removes_the_oldest_and_never_the_newest(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert saved_steps(tmp_path) == ["4", "5"]


def test_the_older_step_stays_until_the_newer_one_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
        assert "1" in saved_steps(tmp_path) or step == 1
    checkpoints.close()
    assert saved_steps(tmp_path) == ["2"]


def test_a_removal_that_was_killed_is_finished_by_the_next_save_without_a_warning(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3" / "state", tmp_path / f"2{UNFINISHED}-old")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(make_state())[1] == 3
    checkpoints.save(4, make_state(4))
    checkpoints.close()
    assert saved_steps(tmp_path) == ["3", "4"]


def test_an_unfinished_folder_stays_until_its_step_is_reached(tmp_path):
    (tmp_path / f"5{UNFINISHED}").mkdir()
    checkpoints = Checkpoints(tmp_path)
    for step, left in ((4, ["4", f"5{UNFINISHED}"]), (6, ["4", "6"])):
        checkpoints.save(step, make_state(step))
        checkpoints.wait()
        assert saved_steps(tmp_path) == left


def test_a_step_under_another_steps_name_is_passed_over(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3", tmp_path / "9")
    with pytest.warns(UserWarning, match="/9: OSError: its metadata are missing or damaged"):
        assert restore(tmp_path)[1] == 3


def test_a_restored_state_may_be_donated(tmp_path):
    save_all(tmp_path, [3])
    state, _, _ = restore(tmp_path)
    increase = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    assert_identical(increase(increase(state)), increase(increase(make_state(3))))


def test_a_half_written_step_is_passed_over_with_a_warning_that_names_it(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3", tmp_path / f"6{UNFINISHED}")
    (tmp_path / f"6{UNFINISHED}" / "_CHECKPOINT_METADATA").unlink()
    with pytest.warns(UserWarning, match=rf"6{UNFINISHED}: it was not written to its end"):
        state, step, _ = restore(tmp_path)
    assert step == 3
    assert_identical(state, make_state(3))
    assert Checkpoints(tmp_path).latest_step() == 3


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_step_with_any_damaged_file_is_passed_over_and_nothing_is_deleted(tmp_path, damage):
    whole = tmp_path / "whole"
    save_all(whole, [3, 6])
    files = [path for path in (whole / "6").rglob("*") if path.is_file()]
    for number, file in enumerate(file for file in files if file.stat().st_size):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)
        damaged = directory / file.relative_to(whole)
        half = damaged.read_bytes()[: file.stat().st_size // 2]
        damaged.unlink() if damage == "missing" else damaged.write_bytes(half)
        if damage == "missing" and file.name == "files.json":
            assert restore(directory)[1] == 6
            continue
        with pytest.warns(UserWarning, match=rf"passed over checkpoint {directory}/6: \w+"):
            state, step, _ = restore(directory)
        assert step == 3
        assert_identical(state, make_state(3))
        assert saved_steps(directory) == ["3", "6"]
    assert number >= 8


def test_damage_is_found_in_a_step_whose_list_of_files_was_not_yet_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(step, {"w": jax.random.normal(jax.random.key(step), (400, 4))})
    checkpoints.close()
    (tmp_path / "6" / "files.json").unlink()
    for data in (tmp_path / "6" / "state" / "ocdbt.process_0" / "d").iterdir():
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="passed over checkpoint .*/6: "):
        assert checkpoints.restore({"w": jax.ShapeDtypeStruct((400, 4), jnp.float32)})[1] == 3


def test_a_broken_step_can_be_saved_again(tmp_path):
    save_all(tmp_path, [3, 6])
    shutil.rmtree(tmp_path / "6" / "state" / "d")
    shutil.copytree(tmp_path / "6", tmp_path / f"5{UNFINISHED}")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert checkpoints.restore(make_state())[1] == 3
    assert len(caught) == 2
    assert checkpoints.latest_step() == 3
    for step in (5, 6):
        checkpoints.save(step, make_state(step + 10))
    checkpoints.close()
    assert saved_steps(tmp_path) == ["5", "6"]
    state, step, _ = restore(tmp_path)
    assert step == 6
    assert_identical(state, make_state(16))


def test_the_newest_step_is_not_written_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, make_state(4))
    checkpoints.save(4, make_state(4))
    checkpoints.close()
    written = (tmp_path / "4").stat().st_mtime_ns
    again = Checkpoints(tmp_path)
    again.restore(make_state())
    again.save(4, make_state(4))
    again.close()
    assert (tmp_path / "4").stat().st_mtime_ns == written


def test_a_run_that_did_not_restore_cannot_overwrite(tmp_path):
    save_all(tmp_path, [4])
    for step in (2, 4):
        with pytest.raises(ValueError, match=r"holds steps \[4\]. Restore them first"):
            Checkpoints(tmp_path).save(step, make_state(9))


def test_a_state_of_another_shape_is_refused_with_both_shapes(tmp_path):
    save_all(tmp_path, [3])
    with pytest.raises(ValueError) as caught:
        restore(tmp_path, make_state(width=6).replace(kl_coef=jnp.int32(0)))
    message = str(caught.value)
    assert (
        "policy_params/embed/tokens: saved (500, 4) float32, expected (500, 6) float32" in message
    )
    assert "opt_state/1/0/mu/layers/0/kernel: saved (4, 3) bfloat16, expected (6, 3)" in message
    assert "kl_coef: saved () float32, expected () int32" in message
    assert "step:" not in message


def test_a_state_of_another_structure_is_refused_with_the_paths(tmp_path):
    save_all(tmp_path, [3])
    example = make_state()
    example.policy_params["head"] = example.policy_params.pop("embed")
    with pytest.raises(ValueError) as caught:
        restore(tmp_path, example)
    assert "policy_params/head/tokens: saved nothing, expected (500, 4) float32" in str(
        caught.value
    )
    assert "policy_params/embed/tokens: saved (500, 4) float32, expected nothing" in str(
        caught.value
    )


def test_a_leaf_that_is_no_array_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="policy/count must be an array to be saved, got"):
        Checkpoints(tmp_path).save(1, {"policy": {"count": 3}})
    with pytest.raises(ValueError, match="policy/count must be an array to be saved, got"):
        save_params(tmp_path / "params", {"policy": {"count": 3}})


def test_one_field_loads_without_the_rest(tmp_path):
    save_all(tmp_path, [3, 6])
    params = load_checkpoint_item(tmp_path, "policy_params")
    assert isinstance(params["embed"]["tokens"], np.ndarray)
    assert_identical(params, make_state(6).policy_params)
    assert_identical(load_checkpoint_item(tmp_path, "kl_coef", step=3), make_state(3).kl_coef)


def test_one_field_of_the_newest_step_that_can_be_read(tmp_path):
    save_all(tmp_path, [3, 6])
    shutil.rmtree(tmp_path / "6" / "state" / "ocdbt.process_0")
    with pytest.warns(UserWarning, match="passed over checkpoint .*/6"):
        params = load_checkpoint_item(tmp_path, "policy_params")
    assert_identical(params, make_state(3).policy_params)
    with pytest.raises(ValueError, match=r"checkpoint .*/6 cannot be read"):
        load_checkpoint_item(tmp_path, "policy_params", step=6)


def test_an_unknown_field_or_folder_is_refused(tmp_path):
    save_all(tmp_path / "run", [3])
    with pytest.raises(ValueError, match=r"no field 'value_params' .* \['kl_coef', 'opt_state'"):
        load_checkpoint_item(tmp_path / "run", "value_params")
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        load_checkpoint_item(tmp_path / "empty", "policy_params")


def test_params_alone_come_back_bit_for_bit_and_are_replaced(tmp_path):
    for seed in (1, 2):
        params = make_state(seed).policy_params
        save_params(tmp_path / "params", params)
        assert_identical(load_params(tmp_path / "params"), params)


def test_params_are_complete_or_absent(tmp_path):
    with pytest.raises(ValueError, match="no params in .*: the folder does not exist"):
        load_params(tmp_path / "params")
    save_params(tmp_path / "params", make_state().policy_params)
    shutil.rmtree(tmp_path / "params" / "state" / "d")
    with pytest.raises(ValueError, match="params in .* cannot be read: "):
        load_params(tmp_path / "params")


WRITER = """
import sys
import numpy as np
from ppo_jax.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
example = {"w": np.zeros((600, 600), np.float32)}
example["n"] = {str(i): np.zeros((), np.int32) for i in range(20)}
restored = checkpoints.restore(example)
step = 0 if restored is None else restored[1]
print("ready", flush=True)
while True:
    step += 1
    state = {"w": np.full((600, 600), step, np.float32)}
    state["n"] = {name: np.int32(step) for name in example["n"]}
    checkpoints.save(step, state, {"step_squared": step * step})
"""


def test_a_process_killed_at_any_moment_leaves_a_complete_step(tmp_path):
    example = {"w": jax.ShapeDtypeStruct((600, 600), jnp.float32)}
    example["n"] = {str(i): jax.ShapeDtypeStruct((), jnp.int32) for i in range(20)}
    moments, reached = random.Random(0), 0
    for _ in range(6):
        command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(0.2 + moments.random())
            os.kill(writer.pid, signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a half-written step is expected here
            restored = restore(tmp_path, example)
        if restored is None:  # killed before the first step was complete
            continue
        state, step, metadata = restored
        assert step >= reached and metadata == {"step_squared": step * step}
        assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(state))
        reached = step
    assert reached > 0
