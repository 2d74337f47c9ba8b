"""Settings of the stages: what `sft`, `reward` and `evaluate` of a config hold, and the parts
that `ppo` has in common with them.

Every number has its unit in a comment, and every rule its check.
"""

import dataclasses
import re

from ppo_jax.config.parsing import Check, Limit, changeable
from ppo_jax.core.distributions import MIN_TEMPERATURE
from ppo_jax.core.optimizer import SCHEDULES
from ppo_jax.models.lora import TARGETS


def check_trainable(check: Check, *fields: str):
    """Each field says which parameters of a network are trained."""
    for field in fields:
        value = getattr(check.settings, field)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        rule = "'all', 'head', 'lora' or a number of top layers >= 1"
        check.that(is_count or value in ("all", "head", "lora"), field, rule)


def check_lora(check: Check, *fields: str):
    """Adapters have a rank, a weight and places, and these are given only where they are read.

    Args:
        check: of a section `lora`, in a stage's section.
        fields: of that stage, which may say "lora".
    """
    lora, stage = check.settings.lora, check.prefix
    own = Check(lora, f"{stage}lora")
    own.each("> 0", "rank", "alpha")
    once = len(set(lora.targets)) == len(lora.targets) > 0
    rule = f"some of {list(TARGETS)}, each once"
    own.that(once and set(lora.targets) <= set(TARGETS), "targets", rule)
    read = "lora" in [getattr(check.settings, field) for field in fields]
    for field, default in vars(type(lora)()).items():
        where = " or ".join(f"{stage}{name}" for name in fields)
        same = getattr(lora, field) == default
        own.that(read or same, field, f"{default!r} unless {where} is 'lora'")


def check_keep(check: Check):
    """Which checkpoints stay."""
    keep = check.settings.keep
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    is_best = isinstance(keep, str) and re.fullmatch(r"best:[a-z]\w*/\w+", keep)
    check.that(is_count or bool(is_best), "keep", "a number >= 1 or 'best:METRIC'")


def check_optimizer(check: Check):
    """Checked by the stage that it belongs to: several have one, and the message says which."""
    check.choice("schedule", *SCHEDULES)
    check.each("> 0", "max_grad_norm", "eps")
    check.each(">= 0", "learning_rate", "warmup_steps", "weight_decay")
    check.each("in [0, 1)", "b1", "b2")
    check.each("in [0, 1]", "final_fraction")


def check_training(check: Check):
    """What the two kinds of training on texts have in common."""
    settings = check.settings
    check_optimizer(Check(settings.optimizer, f"{check.prefix}optimizer"))
    check.each("> 0", "num_epochs", "batch_size", "num_micro_batches", "max_length")
    check.each("> 0", "eval_every", "save_every")
    check_keep(check)
    check.each(">= 0", "hidden_cache_gb")
    check.each("in (0, 1)", "validation_fraction")
    check_trainable(check, "trainable")
    check_lora(check, "trainable")
    check.that(bool(settings.data), "data", "the path of a data set")
    check.multiple("batch_size", settings.num_micro_batches, "num_micro_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam. A step is an optimizer step in SFT and reward training, an iteration in PPO."""

    learning_rate: float = changeable()  # the highest of the schedule
    schedule: str = changeable("cosine")  # or "linear", "constant"
    warmup_steps: int = changeable(0)  # steps from a tenth of the learning rate to all of it
    final_fraction: float = changeable(0.0)  # of the learning rate, at the last step
    max_grad_norm: Limit = changeable(1.0)  # over all trained parameters; inf is off
    weight_decay: float = changeable(0.0)  # decoupled, per step and times the learning rate
    b1: float = changeable(0.9)  # decay a step of the mean gradient
    b2: float = changeable(0.999)  # decay a step of the mean squared gradient
    eps: float = changeable(1e-8)  # added to the root of the mean squared gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapters, where "lora" is what is trained: weights W become W + alpha / rank A B."""

    rank: int = 16  # the narrow width between A and B
    alpha: float = 32.0  # times 1 / rank the weight of what the adapters add
    targets: tuple[str, ...] = ("query", "value")  # projections of every layer; of these two,
    # "key", "output", "up", "gate" and "down"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Supervised fine-tuning on texts, or on completions of prompts."""

    data: str  # rows of {"text"}, {"prompt", "completion"} or {"messages"}, see docs/data.md
    optimizer: OptimizerSettings  # of all trained parameters
    init_from: str = "base"  # the base model; or a policy: a stage folder of another run, a model
    validation_data: str = ""  # rows as of data; "" holds out validation_fraction of the data
    validation_fraction: float = 0.05  # of the data's texts
    trainable: str | int = "all"  # "all", a number of top layers such as "4", "head" or "lora"
    lora: LoRASettings = LoRASettings()  # of the adapters
    num_epochs: float = 1.0  # passes over the data
    batch_size: int = 32  # texts a step; rows of texts with packing
    num_micro_batches: int = changeable(1)  # parts of a batch, in memory one after the other
    packing: bool = False  # several texts a row, up to max_length; no text sees another
    turns: str = "all"  # of the assistant's to learn in a conversation, or "last"
    max_length: int = 512  # tokens; longer texts are left out and counted
    router_coef: float | None = changeable(None)  # weight of the loss that balances experts; None:
    # the model's own, router_aux_loss_coef of its config.json; 0 is off
    hidden_cache_gb: Limit = changeable(4.0)  # for frozen layers' states; not by several processes
    eval_every: int = changeable(50)  # steps between validations
    save_every: int = changeable(100)  # steps between checkpoints
    keep: str | int = changeable(2)  # number of newest checkpoints that stay; or "best:METRIC", the
    # newest and the one that is best by a metric of docs/metrics.md: the lowest of a loss,
    # perplexity, error or KL, the highest of anything else

    def __post_init__(self):
        check = Check(self, "sft")
        check_training(check)
        check.choice("turns", "all", "last")
        rule = "None or a number >= 0"
        check.that(self.router_coef is None or self.router_coef >= 0, "router_coef", rule)
        own, _, _ = self.init_from.partition("@")
        rule = "'base', a stage folder or a model: no stage of this run comes before sft"
        check.that(own not in ("", "sft", "reward", "ppo"), "init_from", rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """A reward model on preferences, or on human ratings."""

    data: str  # rows of preferences, see docs/data.md, or of {"text", "ratings"}
    optimizer: OptimizerSettings  # of all trained parameters
    format: str = "preferences"  # or "ratings"
    init_from: str = "sft"  # a stage of this workdir, "base", a stage folder or a model
    validation_data: str = ""  # rows as of data; "" holds out validation_fraction of the data
    validation_fraction: float = 0.05  # of the data's texts
    num_layers: int = 0  # keep the lowest N layers of the model it starts from; 0 keeps all
    reference_data: str = ""  # rows of texts to score 0 on average; "" is the held-out data
    trainable: str | int = "all"  # "all", a number of top layers such as "4", "head" or "lora"
    lora: LoRASettings = LoRASettings()  # of the adapters
    num_epochs: float = 1.0  # passes over the data; more than one soon overfits
    batch_size: int = 64  # texts a step; a multiple of the most responses to a prompt, of pairs 2
    pairs_per_batch: int = 256  # ratings only: comparisons drawn among the texts of a batch
    num_micro_batches: int = changeable(1)  # parts of a batch, in memory one after the other
    max_length: int = 512  # tokens; longer texts are left out and counted
    packing: bool = changeable(False)  # the texts of a batch share rows of max_length tokens, or of
    # 64 where that is less
    hidden_cache_gb: Limit = changeable(4.0)  # for frozen layers' states; not by several processes
    eval_every: int = changeable(50)  # steps between validations
    save_every: int = changeable(100)  # steps between checkpoints
    keep: str | int = changeable(2)  # number of newest checkpoints, or "best:METRIC": as sft.keep

    def __post_init__(self):
        check = Check(self, "reward")
        check_training(check)
        check.choice("format", "preferences", "ratings")
        check.each("> 0", "pairs_per_batch")
        check.each(">= 0", "num_layers")
        check.that(self.batch_size >= 2, "batch_size", ">= 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Base, SFT and PPO on unseen prompts, before judges that had no part in the training."""

    prompts: str  # rows of {"prompt"} or {"messages"}
    judges: str = ""  # "module:function": (workdir) -> JudgePanel, see "How to add a judge"
    ratings: str = ""  # rows of {"text", "ratings"}: pairs for the reward model; "" is the last
    # validation's accuracy
    num_prompts: int = 256  # the first prompts of the file
    batch_size: int = 64  # prompts at a time
    temperature: float = 1.0  # 0 is greedy

    def __post_init__(self):
        check = Check(self, "evaluate")
        check.that(bool(self.prompts), "prompts", "the path of a data set")
        check.each("> 0", "num_prompts", "batch_size")
        check.each(">= 0", "temperature")
        rule = f"0 or >= {MIN_TEMPERATURE:g}"
        check.that(
            self.temperature == 0 or self.temperature >= MIN_TEMPERATURE, "temperature", rule
        )
