"""Settings: frozen dataclasses, validated before anything is allocated.

A `ConfigDict` lives between the command line and `from_config_dict`, nowhere else. All sizes are
global. A section that is None means that the stage is not part of the run.
"""

import dataclasses
import datetime
from typing import Any

from ml_collections import config_dict

from ppo_jax.config.mesh import MeshSettings
from ppo_jax.config.parsing import (
    Check,
    Dtype,
    build,
    changeable,
    filled_in,
    hints_of,
    options,
)
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.stages import EvaluateSettings, RewardSettings, SFTSettings

WRITERS = ("tensorboard", "wandb", "trackio")  # of metrics, see training/writers.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchSettings:
    """A Llama-shaped model with random weights and a tokenizer trained on the data."""

    vocab_size: int = 2048  # tokens, byte-level BPE
    num_layers: int = 4  # Transformer blocks
    embed_dim: int = 128  # width of the hidden states
    num_heads: int = 4  # of embed_dim / num_heads numbers each
    mlp_dim: int = 384  # width inside the feed-forward layers
    max_length: int = 128  # tokens, prompt and response together

    def __post_init__(self):
        check = Check(self, "model.scratch")
        check.each("> 0", *(field.name for field in dataclasses.fields(self)))
        check.multiple("embed_dim", 2 * self.num_heads, "2 x num_heads")
        check.that(self.vocab_size >= 300, "vocab_size", ">= 300")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: where everything starts."""

    path: str = ""  # a Hugging Face folder, a .gguf file, a hub id or "package:NAME"
    scratch: ScratchSettings | None = None  # instead of a path
    dtype: Dtype = "float32"  # of the computation; "bfloat16" on accelerators, or "float16"
    frozen_dtype: Dtype = "float32"  # of parameters that are not trained, the reference's and the
    # reward model's among them; "bfloat16" halves their memory
    scan_layers: bool = False  # True compiles faster; False runs faster on CPUs
    remat: str = changeable("none")  # what the backward pass computes again to save memory: "none"
    # is fastest, "dots" keeps the products with parameters, "full" only each layer's input: for
    # the longest rows and largest models
    attention: str = changeable("auto")  # over whole rows: "auto" is the platform's fused kernel
    # where it has one (TPU, GPU), "plain" is the same sum by plain products everywhere
    chat_template: str = changeable("")  # a file with the Jinja template that makes text of
    # messages, kept with every stage; "" is the tokenizer's own
    chat_date: str = changeable("")  # today for templates that write the date, such as
    # "2026-11-28"; "" is the day on which the run begins
    vocabulary_data: str = ""  # rows of texts: keep only the tokens that they use; "" keeps all

    def __post_init__(self):
        if bool(self.path) == (self.scratch is not None):
            without = " (--config.model.scratch=None leaves it out)" if self.path else ""
            raise ValueError(
                f"model needs either a path or a scratch section{without}, got "
                f"path={self.path!r} and scratch={self.scratch!r}"
            )
        check = Check(self, "model")
        check.choice("dtype", "float32", "bfloat16", "float16")
        check.choice("frozen_dtype", "float32", "bfloat16")
        check.choice("remat", "none", "dots", "full")
        check.choice("attention", "auto", "plain")
        check.that(is_date(self.chat_date), "chat_date", "'' or a date, year-month-day")
        texts = "the texts to train the tokenizer of model.scratch on"
        check.that(bool(self.vocabulary_data or not self.scratch), "vocabulary_data", texts)


def is_date(text: str) -> bool:
    """Whether a setting is a date such as "2026-11-28", or ""."""
    try:
        return not text or datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run. `{workdir}` in a path is the run's folder."""

    model: ModelSettings  # where the run starts
    seed: int = 0  # of initial weights, data order and sampling
    mesh: MeshSettings = MeshSettings()  # how the devices are arranged, see docs/pods.md
    prepare: str = ""  # "module:function": (folder) -> None, writes the run's data files first
    writers: tuple[str, ...] = changeable(("tensorboard",))  # of metrics, besides metrics.jsonl:
    # any of "tensorboard", "wandb", "trackio"

    # The stages, in the order in which they run; None leaves one out.
    sft: SFTSettings | None = None  # demonstrations
    reward: RewardSettings | None = None  # comparisons or ratings
    ppo: PPOSettings | None = None  # alignment
    evaluate: EvaluateSettings | None = None  # the verdict; needs ppo, whose responses it judges

    def __post_init__(self):
        check = Check(self, "")
        check.each(">= 0", "seed")
        once = len(set(self.writers)) == len(self.writers)
        rule = f"any of {list(WRITERS)}, each once"
        check.that(once and set(self.writers) <= set(WRITERS), "writers", rule)
        if self.evaluate is not None and self.ppo is None:
            raise ValueError("evaluate needs a ppo section, whose responses it judges, got none")
        if self.ppo and self.ppo.evaluate_every and not (self.evaluate and self.evaluate.judges):
            raise ValueError(
                "ppo.evaluate_every needs an evaluate section with prompts and judges, got "
                f"{'one without judges' if self.evaluate else 'none'}"
            )
        if self.evaluate and self.evaluate.ratings and not (self.reward or self.ppo.reward_model):
            raise ValueError("evaluate.ratings must be '' without a reward model to measure")

    @property
    def ppo_seed(self) -> int:
        """The seed of the PPO stage: its own, or that of the run."""
        return self.seed if self.ppo is None or self.ppo.seed < 0 else self.ppo.seed


# The stages that a config may have, in the order in which they run.
STAGE_NAMES = tuple(field.name for field in dataclasses.fields(Config) if field.default is None)


def with_defaults(values: dict) -> config_dict.ConfigDict:
    """A ConfigDict with every field of the sections that `values` has, so that each can be set on
    the command line. What a config file returns; nothing is checked yet."""
    return config_dict.ConfigDict(with_types(Config, filled_in(Config, values)))


def with_types(cls: type, values: dict) -> dict:
    """The values with a number's type in the place of a None that may be one: a ConfigDict takes
    no other value for a plain None."""

    def typed(hint: Any, value: Any) -> Any:
        section = next((o for o in options(hint) if dataclasses.is_dataclass(o)), None)
        if section and isinstance(value, dict):
            return with_types(section, value)
        is_number = value is None and float in options(hint)
        return config_dict.placeholder(float) if is_number else value

    hints = hints_of(cls)
    return {name: typed(hints.get(name), value) for name, value in values.items()}


def from_config_dict(config: config_dict.ConfigDict | dict) -> Config:
    """The typed, validated settings of a ConfigDict.

    Raises:
        ValueError: a key that does not exist, a value of the wrong type, a missing field, or a
            value that is not allowed, each with the field, what was given and what is allowed.
    """
    if isinstance(config, config_dict.ConfigDict):
        config = config.to_dict()
    return build(Config, config)
