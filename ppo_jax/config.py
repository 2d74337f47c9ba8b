"""Settings: frozen dataclasses, validated before anything is allocated.

A `ConfigDict` lives between the command line and `from_config_dict`, nowhere else. All sizes are
global. A section that is None means that the stage is not part of the run.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from ml_collections import config_dict

from ppo_jax.optimizer import SCHEDULES

STAGES = ("sft", "reward", "ppo", "evaluate")
UNBOUNDED = ("max_grad_norm", "hidden_cache_gb")  # limits: inf is none


def require(holds: bool, field: str, got: Any, rule: str):
    """Raise the one kind of error that a wrong setting gives."""
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {got!r}")


def require_positive(settings: Any, section: str, *fields: str):
    for field in fields:
        require(getattr(settings, field) > 0, f"{section}.{field}", getattr(settings, field), "> 0")


def require_choice(settings: Any, section: str, field: str, choices: tuple):
    value = getattr(settings, field)
    require(value in choices, f"{section}.{field}", value, f"one of {list(choices)}")


def require_trainable(value: str | int, field: str):
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    rule = "'all', 'head' or a number of top layers >= 1"
    require(is_count or value in ("all", "head"), field, value, rule)


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
        require_positive(self, "model.scratch", *(f.name for f in dataclasses.fields(self)))
        rule = f"a multiple of 2 x num_heads ({2 * self.num_heads})"
        divides = self.embed_dim % (2 * self.num_heads) == 0
        require(divides, "model.scratch.embed_dim", self.embed_dim, rule)
        require(self.vocab_size >= 300, "model.scratch.vocab_size", self.vocab_size, ">= 300")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: where everything starts."""

    path: str = ""  # a Hugging Face folder, a .gguf file, a hub id or "package:NAME"
    scratch: ScratchSettings | None = None  # instead of a path
    dtype: str = "float32"  # of the computation; "bfloat16" on accelerators
    scan_layers: bool = False  # True compiles faster; False runs faster on CPUs
    vocabulary_data: str = ""  # JSONL of texts: keep only the tokens that they use; "" keeps all

    def __post_init__(self):
        if bool(self.path) == (self.scratch is not None):
            raise ValueError(
                f"model needs either a path or a scratch section, got path={self.path!r} and "
                f"scratch={self.scratch!r}"
            )
        require_choice(self, "model", "dtype", ("float32", "bfloat16", "float16"))
        if self.scratch and not self.vocabulary_data:
            raise ValueError(
                "model.vocabulary_data must name the texts to train the tokenizer of "
                "model.scratch on, got ''"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam. A step is an optimizer step in SFT and reward training, an iteration in PPO."""

    learning_rate: float  # the highest of the schedule
    schedule: str = "cosine"  # or "linear", "constant"
    warmup_steps: int = 0  # steps from a tenth of the learning rate to all of it
    final_fraction: float = 0.0  # of the learning rate, at the last step
    max_grad_norm: float = 1.0  # over all trained parameters; inf is off
    weight_decay: float = 0.0  # decoupled, per step and times the learning rate
    b1: float = 0.9  # decay a step of the mean gradient
    b2: float = 0.999  # decay a step of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean squared gradient


def check_optimizer(settings: OptimizerSettings, section: str):
    """Checked by the stage that it belongs to: several have one, and the message says which."""
    require_choice(settings, section, "schedule", SCHEDULES)
    require_positive(settings, section, "max_grad_norm", "eps")
    for field in ("learning_rate", "warmup_steps", "weight_decay"):
        value = getattr(settings, field)
        require(value >= 0, f"{section}.{field}", value, ">= 0")
    for field in ("b1", "b2"):
        value = getattr(settings, field)
        require(0 <= value < 1, f"{section}.{field}", value, "in [0, 1)")
    f = settings.final_fraction
    require(0 <= f <= 1, f"{section}.final_fraction", f, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Supervised fine-tuning on texts, or on completions of prompts."""

    data: str  # JSONL of {"text"} or {"prompt", "completion"}
    optimizer: OptimizerSettings  # of all trained parameters
    validation_data: str = ""  # JSONL; "" holds out validation_fraction of the data
    validation_fraction: float = 0.05  # of the data's texts
    trainable: str | int = "all"  # "all", a number of top layers such as "4", or "head"
    num_epochs: float = 1.0  # passes over the data
    batch_size: int = 32  # texts a step
    num_micro_batches: int = 1  # pieces of a batch in memory one after the other
    max_length: int = 512  # tokens; longer texts are left out and counted
    hidden_cache_gb: float = 4.0  # frozen layers' states are kept for all texts up to this size
    eval_every: int = 50  # steps between validations
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self):
        check_training(self, "sft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """A reward model on preferences, or on human ratings."""

    data: str  # JSONL of {"prompt", "chosen", "rejected"} or {"text", "ratings"}
    optimizer: OptimizerSettings  # of all trained parameters
    format: str = "preferences"  # or "ratings"
    init_from: str = "sft"  # a stage of this workdir, "base", a stage folder or a model
    validation_data: str = ""  # JSONL; "" holds out validation_fraction of the data
    validation_fraction: float = 0.05  # of the data's texts
    num_layers: int = 0  # keep the lowest N layers of the model it starts from; 0 keeps all
    reference_data: str = (
        ""  # JSONL of texts that shall score 0 on average; "" is the held-out data
    )
    trainable: str | int = "all"  # "all", a number of top layers such as "4", or "head"
    num_epochs: float = 1.0  # passes over the data; more than one soon overfits
    batch_size: int = 64  # texts a step; a pair is two texts
    pairs_per_batch: int = 256  # ratings only: comparisons drawn among the texts of a batch
    num_micro_batches: int = 1  # pieces of a batch in memory one after the other
    max_length: int = 512  # tokens; longer texts are left out and counted
    hidden_cache_gb: float = 4.0  # frozen layers' states are kept for all texts up to this size
    eval_every: int = 50  # steps between validations
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self):
        check_training(self, "reward")
        require_choice(self, "reward", "format", ("preferences", "ratings"))
        require_positive(self, "reward", "pairs_per_batch")
        require(self.num_layers >= 0, "reward.num_layers", self.num_layers, ">= 0")
        require(self.batch_size >= 2, "reward.batch_size", self.batch_size, ">= 2")
        if self.format == "preferences":
            require(self.batch_size % 2 == 0, "reward.batch_size", self.batch_size, "even (pairs)")


def check_training(settings: SFTSettings | RewardSettings, section: str):
    """What the two kinds of training on texts have in common."""
    check_optimizer(settings.optimizer, f"{section}.optimizer")
    fields = ("num_epochs", "batch_size", "num_micro_batches", "max_length")
    require_positive(settings, section, *fields, "eval_every", "save_every")
    require_trainable(settings.trainable, f"{section}.trainable")
    require(bool(settings.data), f"{section}.data", settings.data, "the path of a JSONL file")
    fraction = settings.validation_fraction
    require(0 < fraction < 1, f"{section}.validation_fraction", fraction, "in (0, 1)")
    cache_gb = settings.hidden_cache_gb
    require(cache_gb >= 0, f"{section}.hidden_cache_gb", cache_gb, ">= 0")
    rule = f"a multiple of num_micro_batches ({settings.num_micro_batches})"
    divides = settings.batch_size % settings.num_micro_batches == 0
    require(divides, f"{section}.batch_size", settings.batch_size, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Proximal policy optimization with a KL penalty against the policy it starts from."""

    prompts: str  # JSONL of {"prompt"}
    optimizer: OptimizerSettings  # of the policy; max_grad_norm is over policy and critic
    value_learning_rate: float  # of the critic, on the same schedule
    init_from: str = "sft"  # the policy: a stage of this workdir, "base", a stage folder or a model
    reward_model: str = "reward"  # a stage of this workdir or a stage folder; "" with a function
    reward_function: str = ""  # "module:function": (prompts, responses) -> one number a response
    trainable: str | int = "all"  # "all", a number of top layers such as "4", or "head"
    value_trainable: str | int = "all"  # the same for the critic

    num_iterations: int = 100  # each is a rollout and the updates on it
    rollout_batch_size: int = 64  # responses an iteration
    num_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 1  # optimizer steps a pass
    num_micro_batches: int = 1  # pieces of a minibatch in memory one after the other

    max_prompt_length: int = 64  # tokens; a longer prompt is an error
    response_length: int = 64  # tokens at most
    stop_tokens: tuple[str, ...] = ()  # tokens that end a response besides the tokenizer's EOS
    temperature: float = 1.0  # divides the logits, in sampling and in training
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    missing_eos: str = "keep"  # the score of a response that was cut off: or "penalty", "replace"
    missing_eos_score: float = 1.0  # what is subtracted from it, or put in its place

    kl_coef: float = 0.05  # reward per nat
    kl_estimator: str = "k1"  # or "k2", "k3"
    kl_control: str = "fixed"  # or "adaptive"
    target_kl: float = 6.0  # nats per response, adaptive only
    kl_horizon: float = 10_000.0  # episodes, adaptive only
    gamma: float = 1.0  # discount a token
    gae_lambda: float = 0.95  # 0 is one-step differences, 1 the whole return
    clip_range: float = 0.2  # of the probability ratio, around 1
    value_clip_range: float = 0.2  # of the critic's change, in units of reward
    vf_coef: float = 0.1  # weight of the value loss; Adam divides it out but for max_grad_norm
    entropy_coef: float = 0.0  # weight of the entropy, per nat

    sample_every: int = 10  # iterations between samples of the same prompts
    num_samples: int = 8  # prompts in samples.jsonl
    save_every: int = 20  # iterations between checkpoints

    def __post_init__(self):
        require_positive(
            self,
            "ppo",
            *("num_iterations", "rollout_batch_size", "num_epochs", "num_minibatches"),
            *("num_micro_batches", "max_prompt_length", "response_length", "temperature"),
            *("target_kl", "kl_horizon", "value_clip_range", "sample_every", "save_every"),
        )
        check_optimizer(self.optimizer, "ppo.optimizer")
        for field in ("kl_coef", "vf_coef", "entropy_coef", "value_learning_rate", "top_k"):
            require(getattr(self, field) >= 0, f"ppo.{field}", getattr(self, field), ">= 0")
        for field in ("gamma", "gae_lambda", "min_p"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"ppo.{field}", value, "in [0, 1]")
        require(0 < self.clip_range < 1, "ppo.clip_range", self.clip_range, "in (0, 1)")
        require(0 < self.top_p <= 1, "ppo.top_p", self.top_p, "in (0, 1]")
        require(self.num_samples >= 0, "ppo.num_samples", self.num_samples, ">= 0")
        require_choice(self, "ppo", "missing_eos", ("keep", "penalty", "replace"))
        require_choice(self, "ppo", "kl_estimator", ("k1", "k2", "k3"))
        require_choice(self, "ppo", "kl_control", ("fixed", "adaptive"))
        require_trainable(self.trainable, "ppo.trainable")
        require_trainable(self.value_trainable, "ppo.value_trainable")
        pieces = self.num_minibatches * self.num_micro_batches
        rule = f"a multiple of num_minibatches x num_micro_batches ({pieces})"
        size = self.rollout_batch_size
        require(size % pieces == 0, "ppo.rollout_batch_size", size, rule)
        if bool(self.reward_model) == bool(self.reward_function):
            raise ValueError(
                "ppo needs either a reward_model or a reward_function, got "
                f"reward_model={self.reward_model!r} and reward_function={self.reward_function!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Base, SFT and PPO on unseen prompts, before judges that had no part in the training."""

    prompts: str  # JSONL of {"prompt"}
    judges: str = ""  # "module:function": (workdir) -> {name: judge}; "" compares by score alone
    num_prompts: int = 256  # the first of the file
    batch_size: int = 64  # prompts at a time
    temperature: float = 1.0  # 0 is greedy

    def __post_init__(self):
        require_positive(self, "evaluate", "num_prompts", "batch_size")
        require(self.temperature >= 0, "evaluate.temperature", self.temperature, ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run. `{workdir}` in a path stands for the run's folder."""

    model: ModelSettings  # where the run starts
    seed: int = 0  # of initial weights, data order and sampling
    prepare: str = ""  # "module:function": (folder) -> None, writes the run's data files first
    # The stages, in the order in which they run; None leaves one out.
    sft: SFTSettings | None = None  # demonstrations
    reward: RewardSettings | None = None  # comparisons or ratings
    ppo: PPOSettings | None = None  # alignment
    evaluate: EvaluateSettings | None = None  # the verdict; needs ppo, whose responses it judges

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        if self.evaluate is not None and self.ppo is None:
            raise ValueError("evaluate needs a ppo section, whose responses it judges, got none")


def with_defaults(values: dict) -> config_dict.ConfigDict:
    """A ConfigDict with every field of the sections that `values` has, so that each can be set on
    the command line. What a config file returns; nothing is checked yet."""
    return config_dict.ConfigDict(filled_in(Config, values))


def filled_in(cls: type, values: dict) -> dict:
    """The values, and the defaults of the fields that are not among them."""
    sections = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) or (hint,)
        sections[name] = next((o for o in options if dataclasses.is_dataclass(o)), None)
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    defaults = {k: v for k, v in fields.items() if v is not dataclasses.MISSING}
    return defaults | {
        name: filled_in(sections[name], value) if sections.get(name) and value else value
        for name, value in values.items()
    }


def from_config_dict(config: config_dict.ConfigDict | dict) -> Config:
    """The typed, validated settings of a ConfigDict.

    Raises:
        ValueError: a key that does not exist, a value of the wrong type, a missing field, or a
            value that is not allowed, each with the field, what was given and what is allowed.
    """
    if isinstance(config, config_dict.ConfigDict):
        config = config.to_dict()
    return build(Config, config, "")


def build(cls: type, values: Any, section: str) -> Any:
    """One dataclass from a dictionary of its fields."""
    name = section.rstrip(".") or "config"
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a section of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"unknown setting {section}{unknown[0]}; known: {sorted(fields)}")
    for field in fields.values():
        no_default = field.default is dataclasses.MISSING
        if no_default and field.name not in values:
            raise ValueError(f"{section}{field.name} must be given")
    return cls(**{k: convert(hints[k], v, f"{section}{k}") for k, v in values.items()})


def convert(hint: Any, value: Any, field: str) -> Any:
    """A value as the type of its field, or a ValueError that names the field."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    # A ConfigDict field keeps its type, so one that may be a word or a number is written as text.
    if set(options) == {str, int} and isinstance(value, str) and value.isdecimal():
        return int(value)
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(option, value, field + ".")
        if typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
                return tuple(value)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            finite = math.isfinite(value) or value == math.inf and field.endswith(UNBOUNDED)
            require(finite, field, value, "a finite number")
            return float(value)
        elif type(value) is option:
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{field} must be {names}, got {value!r}")


# Settings that a resumed run may change: numbers that no shape and no data order depends on.
MAY_CHANGE = frozenset(
    [f.name for f in dataclasses.fields(OptimizerSettings)]
    + ["value_learning_rate", "num_iterations", "temperature", "missing_eos_score", "kl_coef"]
    + ["target_kl", "kl_horizon", "gamma", "gae_lambda", "clip_range", "value_clip_range"]
    + ["vf_coef", "entropy_coef", "sample_every", "num_samples", "save_every", "eval_every"]
    + ["num_micro_batches", "hidden_cache_gb"]
)
