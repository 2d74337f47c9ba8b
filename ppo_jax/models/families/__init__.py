"""Model families: the names of options and tensors in their checkpoints.

A family without new arithmetic is one `Family` value in a file of its own, listed in `FAMILIES`.
Imports `models` and `core`. `presets` has published shapes for plans.
"""

from typing import Any

from ppo_jax.models.config import ModelConfig, computation
from ppo_jax.models.families.base import Family, Json, check_options, refuse_unsupported
from ppo_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from ppo_jax.models.families.gpt2 import GPT2
from ppo_jax.models.families.llama import (
    GRANITE,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
)
from ppo_jax.models.families.moe import MIXTRAL, OLMOE, QWEN3_MOE
from ppo_jax.models.families.neox import NEOX
from ppo_jax.models.families.olmo import OLMO2, OLMO3
from ppo_jax.models.families.phi import PHI3

# Where several can hold a model that is of none by name, it is exported as the first.
FAMILIES = (
    *(GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, SEED_OSS, SMOLLM3, GRANITE),
    *(GEMMA, GEMMA2, GEMMA3, PHI3, NEOX, OLMO2, OLMO3),
    *(QWEN3_MOE, MIXTRAL, OLMOE),
)

TEXT_OF_GEMMA3 = (
    "save the model of its text alone: from transformers import AutoModelForImageTextToText as M, "
    "Gemma3ForCausalLM as T; m = M.from_pretrained(FOLDER); t = T(m.config.text_config); "
    "t.model = m.model.language_model; t.lm_head = m.lm_head; t.save_pretrained(NEW_FOLDER)"
)


def family_of(model_type: Any) -> Family:
    """The family with this `model_type`.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        if family.name == model_type:
            return family
    if model_type == "gemma3":
        raise ValueError(f"model_type 'gemma3' reads images, too; {TEXT_OF_GEMMA3}")
    names = sorted(family.name for family in FAMILIES)
    raise ValueError(f"model_type {model_type!r} is not supported; choose from {names}")


def read_config(raw: Json, **options: Any) -> ModelConfig:
    """The content of a config.json as a `ModelConfig`; for `options` see `config.computation`.

    Raises:
        ValueError: the family or one of its options is not supported, a key is missing, or a value
            has another type or range than it may have.
    """
    family = family_of(raw.get("model_type"))
    check_options(raw)
    refuse_unsupported(raw, family)
    given = {key: value for key, value in {**family.implied, **raw}.items() if value is not None}
    return ModelConfig(**options, **family.read(given), family=family.name)


def write_config(config: ModelConfig) -> Json:
    """The inverse of `read_config`: the config.json of a model, without token ids.

    The family is the one that the model was read from, or else, and where that cannot hold it, the
    first that can; the options of `computation` are not written.

    Raises:
        ValueError: no family can hold it.
    """
    for family in sorted(FAMILIES, key=lambda x: x.name != config.family):
        raw = {"model_type": family.name, **family.write(config)}
        try:
            read = read_config(raw, **computation(config))
        except ValueError:  # its width is not a multiple of its heads
            continue
        if read == config:
            return raw
    names = sorted(family.name for family in FAMILIES)
    raise ValueError(f"none of {names} has a model of the shape {config}")
