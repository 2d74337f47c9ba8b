"""Supervised fine-tuning of mixtures of experts with the loss of their routers, as transformers
has it: `output_router_logits` and `labels`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.supervised import sft_loss
from ppo_jax.core.types import TextBatch
from ppo_jax.io import huggingface as hf
from ppo_jax.models.build import policy_network
from tests.support.tiny_hf import torch, torch_model

COEF, LENGTH = 0.7, 9


def texts(vocab_size):
    """Texts with padding behind them; the longest has one, for the last column is not run."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (3, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([[LENGTH - 1], [4], [6]])
    learned = mask & (np.arange(LENGTH) > 0)
    return TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=learned)


def transformers_loss(model, batch):
    """(loss, gradients of the routers by layer): with the loss of the routers, labels -100 where
    nothing is learned."""
    labels = np.where(batch.loss_mask, batch.tokens, -100)
    as_torch = functools.partial(torch.tensor, dtype=torch.long)
    model.zero_grad()
    loss = model(
        input_ids=as_torch(batch.tokens),
        attention_mask=as_torch(batch.mask),
        labels=as_torch(labels),
        output_router_logits=True,
    ).loss
    loss.backward()
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    return loss.item(), [router.weight.grad.numpy().T for router in routers]


@pytest.mark.parametrize(
    "name", ["mixtral", "olmoe", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("how", [{}, {"scan_layers": True, "remat": "dots"}], ids=str)
def test_loss_and_gradients_of_the_routers_are_those_of_transformers(tmp_path, name, how):
    pytest.importorskip("torch")
    model = torch_model(name, router_aux_loss_coef=COEF)
    model.save_pretrained(tmp_path)
    config, params = hf.load_policy(tmp_path, **how)
    assert config.experts.aux_coef == COEF
    batch = texts(config.vocab_size)
    expected, gradients = transformers_loss(model, batch)

    def loss(params):
        network, weight = policy_network(config), config.experts.aux_coef
        return sft_loss(network, params, jax.tree.map(jnp.asarray, batch), router_coef=weight)

    (got, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert metrics["sft/router_loss"] > 1.0
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["sft/loss"] + COEF * metrics["sft/router_loss"], got)
    layers = gradient["layers"]
    if "stack" in layers:
        routers = list(layers["stack"]["experts"]["router"]["kernel"])
    else:
        routers = [layers[i]["experts"]["router"]["kernel"] for i in sorted(layers, key=int)]
    for own, theirs in zip(routers, gradients, strict=True):
        np.testing.assert_allclose(own, theirs, atol=1e-3 * np.abs(theirs).max())
