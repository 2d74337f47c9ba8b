"""The rules that several sections of settings share; `config` has the settings themselves."""

from ppo_jax.lora import TARGETS
from ppo_jax.optimizer import SCHEDULES
from ppo_jax.typed import Check


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
    check.each(">= 0", "hidden_cache_gb")
    check.each("in (0, 1)", "validation_fraction")
    check_trainable(check, "trainable")
    check_lora(check, "trainable")
    check.that(bool(settings.data), "data", "the path of a data set")
    check.multiple("batch_size", settings.num_micro_batches, "num_micro_batches")
