import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.importance import importance_weights
from ppo_jax.core.masking import masked_mean
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.sequence_losses import aggregation_weights, gspo_policy_loss
from tests.support.losses import NeMo, assert_golden, random_tokens, value_and_gradient

CLIP = dict(clip_range=0.1, clip_range_high=0.15)


def test_gspo_equals_the_loop():
    new, old, advantages, _, mask = random_tokens(2)
    mask = mask.at[2].set(False)
    advantages = jnp.broadcast_to(advantages[:, :1], mask.shape)

    def of_rows(logprobs):
        """The definition, one ratio for a row: (loss, [ratio], [clipped])"""
        terms, ratios, clipped = [], [], []
        for x, o, a, m in zip(logprobs, np.float64(old), np.float64(advantages), mask, strict=True):
            if m.any():
                s, a = np.exp((x - o)[m].mean()), a[0]
                limited = min(max(s, 0.9), 1.15)
                terms.append(max(-a * s, -a * limited))
                ratios.append(s)
                clipped.append(-a * limited > -a * s)
        return np.mean(terms), ratios, clipped

    at = np.float64(new)
    value, ratios, clipped = of_rows(at)
    assert 0 < sum(clipped) < len(clipped) == 5
    gradient = np.zeros(mask.shape)
    for place in zip(*np.nonzero(mask), strict=True):
        step = np.zeros(mask.shape)
        step[place] = 1e-6
        gradient[place] = (of_rows(at + step)[0] - of_rows(at - step)[0]) / 2e-6
    got, metrics, grad = value_and_gradient(gspo_policy_loss, new, old, advantages, mask, **CLIP)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(grad, gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(metrics["policy/clip_fraction"], np.mean(clipped), rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/ratio_mean"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/ratio_max"], np.max(ratios), rtol=1e-5)


def test_advantages_of_tokens_weigh_the_gradient_of_their_own_token():
    new, old, advantages, _, mask = random_tokens(5)
    how = dict(clip_range=jnp.inf)
    _, _, grad = value_and_gradient(gspo_policy_loss, new, old, advantages, mask, **how)
    lengths = np.asarray(mask).sum(axis=1, keepdims=True)
    means = np.where(mask, new - old, 0.0).sum(axis=1, keepdims=True) / lengths
    expected = np.where(mask, -np.exp(means) * advantages / lengths, 0.0) / len(lengths)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def packed(x):
    """[6, 5] as two rows of three responses, with padding between and at the end."""
    wider = jnp.pad(x, ((0, 0), (0, 1)))
    return jnp.pad(wider.reshape(2, 18), ((0, 0), (0, 2)))


def test_responses_that_share_rows_give_the_same_numbers():
    new, old, advantages, _, mask = random_tokens(6)
    mask = mask.at[4].set(False)
    ids = packed(jnp.where(mask, jnp.array([1, 2, 3, 1, 2, 3])[:, None], 0))
    arrays = (new, old, advantages, mask)
    for normalizer in (None, 9):
        how = CLIP | dict(normalizer=normalizer)
        value, metrics, grad = value_and_gradient(gspo_policy_loss, *arrays, **how)
        shared = jax.jit(
            lambda *given, how=how: value_and_gradient(
                gspo_policy_loss, *given, segment_ids=ids, **how
            )
        )
        got, of_shared, shared_grad = shared(*map(packed, arrays))
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(shared_grad, packed(grad), rtol=1e-6, atol=1e-9)
        for name in metrics:
            np.testing.assert_allclose(of_shared[name], metrics[name], rtol=1e-6, err_msg=name)


def test_the_numbers_of_nemo_rl():
    """Case gspo_sequence_is: there the ratio's gradient spreads over the sequence, so that of
    advantages which differ the mean counts."""
    mask = NeMo.mask
    limits = dict(low=0.0, high=jnp.inf, level="sequence")
    weights, _ = importance_weights(NeMo.before, NeMo.sampled, mask, **limits)
    kept = jnp.where(mask, NeMo.advantages, 0.0)
    mean = kept.sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
    given = (NeMo.new, NeMo.before, jnp.broadcast_to(mean, mask.shape) * weights, mask)
    got = value_and_gradient(gspo_policy_loss, *given, clip_range=0.2)
    row, other = -0.06749293963637779, 0.06907318137816686
    assert_golden(got, -0.06433245613699731, [[row, row, row], [other, other, 0.0]])


MASK = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], bool)
TERMS = jnp.arange(1.0, 13.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (dict(), (1 + 2 + 5 + 6 + 7 + 9) / 6),
        (dict(how="sequence_mean"), (1.5 + 6 + 9) / 3),
        # verl, tests/trainer/ppo/test_loss_aggregation_on_cpu.py, seq-mean-token-sum-norm
        (dict(how="constant", length=4), 2.5),
        (dict(how="constant", length=10), 1.0),
    ],
)
def test_aggregation(how, expected):
    weights = aggregation_weights(MASK, **how)
    got = masked_mean(weights * TERMS, MASK)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not weights[~MASK].any()
    # A row without a token is no response.
    longer = jnp.concatenate([MASK, jnp.zeros((2, 4), bool)])
    np.testing.assert_allclose(aggregation_weights(longer, **how)[:3], weights, rtol=1e-6)
    assert not aggregation_weights(longer & False, **how).any()


@pytest.mark.parametrize("how", ["sequence_mean", "constant"])
def test_micro_batches_add_up_to_the_aggregation_of_the_minibatch(how):
    new, old, advantages, _, mask = random_tokens(7)
    length = 8.0 if how == "constant" else None
    weights = aggregation_weights(mask, how=how, length=length)
    plain = jnp.maximum(
        *(-advantages * r for r in (jnp.exp(new - old), jnp.clip(jnp.exp(new - old), 0.8, 1.2)))
    )
    rows = jnp.where(mask, plain, 0.0).sum(axis=1) / (length or mask.sum(axis=1))
    total = sum(
        clipped_policy_loss(
            new[part],
            old[part],
            advantages[part],
            mask[part],
            clip_range=0.2,
            weights=weights[part],
            normalizer=mask.sum(),
        )[0]
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    )
    np.testing.assert_allclose(total, rows.mean(), rtol=1e-5)
