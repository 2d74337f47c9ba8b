"""Finished stages without a training: what a run leaves, from a model that is given."""

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.stage_folder import Model, begin_stage
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.partition import split_params
from ppo_jax.pipeline.export import export_stage
from ppo_jax.training.stages import find_stage
from tests.support import tiny

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def word_tokenizer(size, **tokens):
    """A tokenizer of exactly `size` tokens: <eos> is 0, then the words w1, w2, ..."""
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **tokens)


def byte_tokenizer(template=None):
    tokenizer = vocabulary.train_tokenizer(["a film of few words"] * 3, 300)
    tokenizer.chat_template = template
    return tokenizer


def random_model(kind="policy", template=None, **changes):
    """A tiny model far from its start, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(template)
    config = tiny.model_config(vocab_size=len(tokenizer), **changes)
    network = policy_network(config) if kind == "policy" else reward_network(config)
    params = jax.tree.map(np.asarray, tiny.random_params(network))
    return Model(kind=kind, config=config, params=params, tokenizer=tokenizer)


def write_stage(workdir, stage, model, /, *, num_steps=1, **settings):
    """The folder of a stage whose only checkpoint, after its first step, is the given model."""
    settings = {"seed": 0, "model": {"path": "someone/some-model"}} | settings
    field = find_stage(stage).trained_field
    about = {"stage": stage, "trained_field": field, "num_steps": num_steps, "settings": settings}
    parts = split_params(model.config, model.params, settings.get("trainable", "all"), None)
    begin_stage(workdir / stage, model, parts, about)
    checkpoints = Checkpoints(workdir / stage / "checkpoints")
    checkpoints.save(1, {field: parts.trained})
    checkpoints.close()
    return workdir / stage


def exported(workdir, stage, model, /, dtype="float32", adapter_of="", **settings):
    """The folder `workdir/out` that a stage with this model is exported to."""
    write_stage(workdir, stage, model, **settings)
    export_stage(workdir, stage, workdir / "out", dtype=dtype, adapter_of=adapter_of)
    return workdir / "out"
