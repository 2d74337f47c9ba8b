"""Logits of every family for shapes and options drawn at random, against transformers."""

import random

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ppo_jax.io import huggingface as hf
from ppo_jax.models.build import policy_apply
from tests.support.tiny_hf import torch

FULL, SLIDING = "full_attention", "sliding_attention"
LENGTH = 21
# Layers of a model, and positions of its longest text: some texts here are longer, so that what
# changes there is seen.
LAYERS, POSITIONS = (2, 3, 5), (16, 64)


def shape(draw, *, head_dim=True, grouped=True):
    """Sizes that are multiples of nothing in particular."""
    heads, size = draw.choice([1, 2, 3, 5, 6]), draw.choice([4, 6, 10, 16])
    of_heads = [n for n in range(1, heads + 1) if heads % n == 0]
    own = {"head_dim": draw.choice([size, size + 2])} if head_dim else {}
    return {
        "vocab_size": draw.choice([31, 61, 97]),
        # In fewer numbers a norm is close to 0 / 0, and what is rounded is what there is.
        "hidden_size": max(12, heads * size) if head_dim else heads * size,
        "intermediate_size": draw.choice([7, 33, 50]),
        "num_hidden_layers": draw.choice(LAYERS),
        "num_attention_heads": heads,
        "max_position_embeddings": draw.choice(POSITIONS),
        "tie_word_embeddings": draw.random() < 0.5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **({"num_key_value_heads": draw.choice(of_heads)} if grouped else {}),
        **own,
    }


def rms(draw):
    return {"rms_norm_eps": draw.choice([1e-6, 1e-3])}


def flags(draw, *names):
    return {name: draw.random() < 0.5 for name in names}


def window(draw):
    return {"sliding_window": draw.choice([1, 4, 9, 40])}


def types(draw, config):
    count = config["num_hidden_layers"]
    return {"layer_types": [draw.choice([FULL, SLIDING]) for _ in range(count)]}


def rope(draw):
    """One of the kinds of scaling; numbers that change much in short texts."""
    original = {"original_max_position_embeddings": draw.choice([8, 32])}
    factor = {"factor": draw.choice([2.0, 3.5])}
    kinds = {
        "default": {},
        "linear": factor,
        "dynamic": factor,
        "llama3": {**factor, **original, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {
            **factor,
            **original,
            **draw.choice([{}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"attention_factor": 1.3}]),
            **draw.choice([{}, {"truncate": False}, {"mscale": 1.2, "mscale_all_dim": 0.5}]),
        },
    }
    kind = draw.choice(list(kinds))
    return {"rope_type": kind, "rope_theta": draw.choice([100.0, 1e4]), **kinds[kind]}


def scaled(draw):
    return {"rope_parameters": rope(draw)}


def gemma(draw):
    return shape(draw) | rms(draw) | flags(draw, "attention_bias") | scaled(draw)


def gemma2(draw):
    config = gemma(draw) | window(draw)
    caps = draw.choice([{}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}])
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0} | caps
    scale = {"query_pre_attn_scalar": draw.choice([3, 20])}
    return config | caps | scale | draw.choice([{}, types(draw, config)])


def local(draw):
    positions = {FULL: rope(draw), SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
    positions[FULL].pop("truncate", None)  # which transformers reads outside of the object
    return {"rope_parameters": positions}


def gemma3(draw):
    config = gemma(draw) | local(draw) | window(draw) | {"query_pre_attn_scalar": 7}
    return config | {"final_logit_softcapping": draw.choice([None, 4.0])} | types(draw, config)


def phi3(draw):
    config = shape(draw) | rms(draw) | window(draw) | {"head_dim": draw.choice([8, 16])}
    config["hidden_size"] = config["num_attention_heads"] * config["head_dim"]
    partial = draw.choice([0.75, 1.0])
    pairs = int(config["head_dim"] * partial) // 2
    numbers = [draw.uniform(1, 4) for _ in range(2 * pairs)]
    long = {"short_factor": numbers[:pairs], "long_factor": numbers[pairs:]}
    positions = draw.choice([{"rope_type": "default"}, {"rope_type": "longrope", **long}])
    positions |= {"rope_theta": 100.0, "partial_rotary_factor": partial}
    original = {"original_max_position_embeddings": draw.choice([8, 32])}
    return config | original | {"rope_parameters": positions}


def neox(draw):
    config = shape(draw, head_dim=False, grouped=False)
    # Half of a head is an odd number of pairs for some; its sizes are even.
    config["hidden_size"] = config["num_attention_heads"] * draw.choice([4, 8, 12])
    positions = rope(draw) | {"partial_rotary_factor": draw.choice([0.5, 1.0])}
    own = {"hidden_act": draw.choice(["gelu", "gelu_new"]), "layer_norm_eps": 1e-3}
    more = flags(draw, "use_parallel_residual", "attention_bias")
    return config | own | more | {"rope_parameters": positions}


def qwen(draw):
    config = shape(draw) | rms(draw) | scaled(draw) | window(draw)
    return config | {"use_sliding_window": draw.random() < 0.7, "max_window_layers": 1}


def olmo(draw):
    return shape(draw, head_dim=False) | rms(draw) | flags(draw, "attention_bias") | scaled(draw)


def olmo3(draw):
    config = olmo(draw) | local(draw) | window(draw)
    return config | draw.choice([{}, types(draw, config)])


def llama(draw):
    return shape(draw) | rms(draw) | flags(draw, "attention_bias", "mlp_bias") | scaled(draw)


def smollm3(draw):
    config = shape(draw, head_dim=False) | rms(draw) | flags(draw, "attention_bias", "mlp_bias")
    own = [draw.randrange(2) for _ in range(config["num_hidden_layers"])]
    layers = draw.choice([{}, {"no_rope_layers": own}, {"no_rope_layer_interval": 2}])
    return config | scaled(draw) | layers


def granite(draw):
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    factors = {name: draw.uniform(0.1, 2.0) for name in (*names, "logits_scaling")}
    return llama(draw) | factors


def experts(draw, name="num_experts"):
    count = draw.choice([3, 5, 8])
    return {name: count, "num_experts_per_tok": draw.randint(1, count)}


def qwen3_moe(draw):
    config = shape(draw) | rms(draw) | flags(draw, "attention_bias", "norm_topk_prob")
    dense = [i for i in range(config["num_hidden_layers"]) if draw.random() < 0.3]
    width = {"moe_intermediate_size": draw.choice([5, 18])}
    own = draw.choice([{}, {"mlp_only_layers": dense}, {"decoder_sparse_step": 2}])
    return config | experts(draw) | width | scaled(draw) | own


def mixtral(draw):
    config = shape(draw) | rms(draw) | scaled(draw) | experts(draw, "num_local_experts")
    return config | draw.choice([{}, window(draw)])


def olmoe(draw):
    config = olmo(draw) | experts(draw) | flags(draw, "norm_topk_prob")
    return config | {"clip_qkv": None}


DRAWN = {
    "llama": llama,
    "mistral": lambda draw: shape(draw) | rms(draw) | scaled(draw) | window(draw),
    "qwen2": qwen,
    "qwen3": lambda draw: qwen(draw) | flags(draw, "attention_bias"),
    "seed_oss": lambda draw: llama(draw) | flags(draw, "attention_out_bias"),
    "smollm3": smollm3,
    "granite": granite,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "gpt_neox": neox,
    "olmo2": olmo,
    "olmo3": olmo3,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]


def model_of(family, seed):
    options = DRAWN[family](random.Random(f"{family} {seed}"))
    config = transformers.AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", DRAWN)
def test_logits_of_any_shape_are_those_of_transformers(tmp_path, family, seed):
    pytest.importorskip("torch")
    model = model_of(family, seed)
    model.save_pretrained(tmp_path)
    scans = seed % 2 == 1 and not any(kind.dense for kind in hf.load_config(tmp_path).layer_kinds)
    config, params = hf.load_policy(tmp_path, scan_layers=scans)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, LENGTH))
    for padding in ([0, 0], [0, 8]):  # a row without: transformers goes by the longest text
        mask = np.arange(LENGTH) >= np.array(padding)[:, None]
        with torch.no_grad():
            theirs = model(
                input_ids=torch.tensor(tokens),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0)),
            ).logits.numpy()
        ours = policy_apply(config, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        most = 1e-4 * max(1.0, np.abs(theirs[mask]).max())
        assert np.abs(np.asarray(ours) - theirs)[mask].max() <= most, config
