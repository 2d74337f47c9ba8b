"""What was saved comes back bit for bit, and nothing that is there is overwritten."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from tests.support.tiny_state import assert_identical, make_state, restore, save_all, saved_steps


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


def test_a_restored_state_may_be_donated(tmp_path):
    save_all(tmp_path, [3])
    state, _, _ = restore(tmp_path)
    increase = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    assert_identical(increase(increase(state)), increase(increase(make_state(3))))


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
