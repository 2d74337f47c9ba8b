"""The loss that balances experts, against transformers and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.router import load_balancing_loss, router_metrics, router_statistics

LAYERS, ROWS, LENGTH, EXPERTS = 3, 2, 5, 4


def problem(num_chosen, seed=0):
    """(logits, chosen, mask) of some layers; what padding holds is NaN."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(LAYERS, ROWS, LENGTH, EXPERTS)).astype(np.float32)
    chosen = np.argsort(-logits)[..., :num_chosen].astype(np.int32)
    mask = np.arange(LENGTH) >= np.array([[0], [3]])
    logits[:, ~mask] = np.nan
    return jnp.asarray(logits), jnp.asarray(chosen), jnp.asarray(mask)


def statistics_of(logits, chosen, mask, before=None):
    one = jax.vmap(router_statistics, in_axes=(0, 0, None, None if before is None else 0))
    return one(logits, chosen, mask, before)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("num_chosen", [1, 3])
def test_the_loss_and_its_gradient_are_those_of_transformers(family, num_chosen):
    torch = pytest.importorskip("torch")
    path = f"transformers.models.{family}.modeling_{family}"
    theirs = pytest.importorskip(path).load_balancing_loss_func
    logits, chosen, mask = problem(num_chosen)
    finite = np.where(mask[..., None], logits, 0.0)
    layers = [torch.tensor(x.reshape(-1, EXPERTS), requires_grad=True) for x in finite]
    expected = theirs(tuple(layers), EXPERTS, num_chosen, torch.tensor(np.asarray(mask)).long())
    expected.backward()

    def loss(logits):
        return load_balancing_loss(statistics_of(logits, chosen, mask))

    got, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(got, expected.item(), rtol=1e-5)
    their_gradient = np.stack([x.grad.numpy() for x in layers]).reshape(logits.shape)
    assert np.abs(their_gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, their_gradient, atol=1e-6)


def test_statistics_of_parts_add_up_to_those_of_all():
    arrays = problem(2)
    whole = statistics_of(*arrays)
    parts = [
        statistics_of(*(x[..., i : i + 1, :, :] for x in arrays[:2]), arrays[2][i : i + 1])
        for i in range(ROWS)
    ]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-6), whole, *parts)


def test_metrics_by_hand():
    """Three tokens of one layer, the last of them padding; uniform probabilities."""
    chosen = jnp.array([[0, 1], [2, 1], [3, 3]])
    before = jnp.array([[1, 0], [2, 3], [0, 0]])  # the same in another order; one other
    mask = jnp.array([True, True, False])
    one = router_statistics(jnp.zeros((3, EXPERTS)), chosen, mask, before)
    metrics = router_metrics(jax.tree.map(lambda x: x[None], one))
    assert metrics["policy/router_loss"] == 2.0  # k, as of any uniform router
    assert metrics["policy/router_load_max"] == 1.0  # both tokens have expert 1
    np.testing.assert_allclose(metrics["policy/router_entropy"], np.log(EXPERTS), rtol=1e-6)
    assert metrics["policy/router_mismatch"] == 0.25


def test_of_no_token_all_is_zero():
    logits, chosen, mask = problem(2)
    statistics = statistics_of(logits, chosen, jnp.zeros_like(mask), chosen)
    assert all(x == 0 for x in router_metrics(statistics).values())
