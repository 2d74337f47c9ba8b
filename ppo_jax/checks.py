"""What is refused before a run begins, so that nothing fails in its third stage after an hour."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ppo_jax.batches import Texts, encode_prompts
from ppo_jax.config import STAGES, Config, PPOSettings
from ppo_jax.data import load_prompts
from ppo_jax.evaluate import evaluation_prompts
from ppo_jax.generation import stop_ids
from ppo_jax.models import describe_stage, missing_steps
from ppo_jax.plan import Shape, needs_base
from ppo_jax.plugins import load_function
from ppo_jax.reward_data import reward_data
from ppo_jax.sft_loop import sft_data

FILES = {
    "sft": ("data", "validation_data"),
    "reward": ("data", "validation_data", "reference_data"),
    "ppo": ("prompts",),
    "evaluate": ("prompts", "ratings"),
}


def check_named(config: Config, workdir: Path, stages: Sequence[str]):
    """All that the config names is there, or will be: before anything is fetched or made.

    Args:
        config: of the run.
        workdir: the run's folder, which may hold stages already.
        stages: those that will run, in their order.

    Raises:
        ValueError: a function, a file or a stage is missing.
    """
    check_functions(config, stages)
    check_files(config, workdir, stages)
    check_sources(config, workdir, stages)


def check_run(config: Config, starts: Mapping[str, Shape], stages: Sequence[str]):
    """Check the stages against the models that they start from, and the data.

    Args:
        config: of the run.
        starts: what the stages start from, see `plan.find_starts`.
        stages: those that will run.

    Raises:
        ValueError: a stage could not run when its turn comes.
    """
    for stage in ("sft", "ppo"):
        if stage in stages:
            check_policy(stage, config, starts[stage])
    if "reward" in stages:
        check_reward(config, starts["reward"])
    if "ppo" in stages:
        check_ppo(config.ppo, starts["ppo"], starts.get("score"))
    check_data(config, starts, stages)


def check_functions(config: Config, stages: Sequence[str]):
    """The functions that the config names can be imported."""
    if config.prepare:
        load_function(config.prepare, "prepare")
    if "ppo" in stages and config.ppo.reward_function:
        load_function(config.ppo.reward_function, "ppo.reward_function")
    if "evaluate" in stages and config.evaluate.judges:
        load_function(config.evaluate.judges, "evaluate.judges")


def check_files(config: Config, workdir: Path, stages: Sequence[str]):
    """The data files are there, but for those that `prepare` will write."""
    named = {
        f"{stage}.{field}": getattr(getattr(config, stage), field)
        for stage in stages
        for field in FILES[stage]
    }
    if needs_base(config, stages):
        named["model.vocabulary_data"] = config.model.vocabulary_data
    for field, path in named.items():
        comes_later = config.prepare and Path(path).is_relative_to(workdir / "data")
        if path and not comes_later and not Path(path).is_file():
            raise ValueError(f"{field} must be a file, got {path!r}, which is not there")


def check_sources(config: Config, workdir: Path, stages: Sequence[str]):
    """What a stage starts from is there, or is made by a stage before it."""
    fields = {"reward": ["init_from"], "ppo": ["init_from", "reward_model"]}
    for stage in stages:
        before = stages[: stages.index(stage)]
        for field in fields.get(stage, []):
            name = getattr(getattr(config, stage), field)
            missing = missing_steps(workdir / name) if name in STAGES else None
            if name not in before and missing:
                raise ValueError(
                    f"{stage}.{field}={name!r} needs the stage {name}, but {missing}: give the "
                    f"config a section for it, or run it in {workdir} first"
                )
            path_given = name and name != "base" and name not in STAGES
            is_stage = path_given and describe_stage(Path(name)) is not None
            if is_stage and (missing := missing_steps(Path(name))):
                raise ValueError(f"{stage}.{field}={name!r} is not complete: {missing}")
            if path_given and field == "reward_model" and not is_stage:
                raise ValueError(f"ppo.reward_model must be a stage or its folder, got {name!r}")
    if config.model.path and describe_stage(Path(config.model.path)):
        raise ValueError(
            f"model.path must be a model, got the stage folder {config.model.path!r}: name it as "
            "reward.init_from or ppo.init_from"
        )


def check_policy(stage: str, config: Config, start: Shape):
    """A stage that trains a policy has one, and has the layers that it trains."""
    trainable = getattr(config, stage).trainable
    if start.kind != "policy":
        raise ValueError(
            f"ppo.init_from must be a policy, got {config.ppo.init_from!r}, which scores texts"
        )
    if trainable == "head" and start.config.tie_embeddings:
        raise ValueError(
            f"{stage}.trainable must be 'all' or a number of top layers for a model that ties "
            "its head to the token table, got 'head'"
        )
    check_depth(f"{stage}.trainable", trainable, start.config.num_layers)


def check_reward(config: Config, start: Shape):
    depth = start.config.num_layers
    check_depth("reward.num_layers", config.reward.num_layers, depth)
    check_depth("reward.trainable", config.reward.trainable, config.reward.num_layers or depth)


def check_ppo(settings: PPOSettings, policy: Shape, score: Shape | None):
    """Lengths fit the policy; the reward model scores, and reads what the policy writes."""
    context = min([policy.config.max_length] + ([score.config.max_length] if score else []))
    total = settings.max_prompt_length + settings.response_length
    if total > context:
        raise ValueError(
            f"ppo.max_prompt_length + ppo.response_length must be at most {context} (the models' "
            f"context), got {settings.max_prompt_length} + {settings.response_length}"
        )
    if score is not None and score.kind != "reward":
        raise ValueError(
            f"ppo.reward_model must be a reward model, got the policy {settings.reward_model!r}"
        )
    if score is not None and policy.tokenizer.get_vocab() != score.tokenizer.get_vocab():
        raise ValueError(
            "ppo.reward_model must have the policy's tokenizer, got one with "
            f"{len(score.tokenizer)} tokens where the policy has {len(policy.tokenizer)}, or other "
            "ids. Use a reward_function, which gets text."
        )
    critic = policy if score is None or settings.critic_init_from == "policy" else score
    check_depth("ppo.value_trainable", settings.value_trainable, critic.config.num_layers)


def check_depth(field: str, count: str | int, depth: int):
    if isinstance(count, int) and count > depth:
        raise ValueError(f"{field} must be at most {depth}, the model's layers, got {count}")


def check_data(config: Config, starts: Mapping[str, Shape], stages: Sequence[str]):
    """Read and tokenise the data of every stage, so that a bad file stops the run at once."""
    if "sft" in stages:
        start = starts["sft"]
        parts = sft_data(config.sft, config.seed, start.tokenizer)
        check_texts("sft", config.sft, parts, start.config.max_length)
    if "reward" in stages:
        start, context = starts["reward"], starts["reward"].config.max_length
        data = reward_data(config.reward, config.seed, start.tokenizer, context)
        check_texts("reward", config.reward, [part.texts for part in data], context)
    if "ppo" in starts:
        stop_ids(starts["ppo"].tokenizer, config.ppo.stop_tokens)
        check_prompts(config, config.ppo.prompts, load_prompts(config.ppo.prompts), starts["ppo"])
    if "evaluate" in stages:
        prompts = evaluation_prompts(config.evaluate)
        check_prompts(config, config.evaluate.prompts, prompts, starts["ppo"])


def check_prompts(config: Config, path: str, prompts: Sequence[str], policy: Shape):
    """Every prompt has a token, and at most ppo.max_prompt_length of them."""
    try:
        length = config.ppo.max_prompt_length
        encode_prompts(prompts, policy.tokenizer, max_length=length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; see ppo.max_prompt_length") from None


def check_texts(stage: str, settings, parts: Sequence[Texts], context: int):
    """Refuse texts beyond the model's context and batches beyond the data; tell what is left out.

    Args:
        stage: its name.
        settings: the stage's section.
        parts: texts to train on, and to validate on.
        context: tokens that the model can read.
    """
    longest = max(int(part.mask.sum(axis=1).max()) for part in parts)
    if longest > context:
        raise ValueError(
            f"{stage}.max_length must be at most {context} (the model's context), got "
            f"{settings.max_length}: a text has {longest} tokens"
        )
    rows = len(parts[0].mask)
    if settings.batch_size > rows:
        raise ValueError(
            f"{stage}.batch_size must be at most {rows}, the texts to train on, got "
            f"{settings.batch_size}"
        )
    if dropped := sum(part.num_dropped for part in parts):
        total = dropped + sum(len(set(part.records.tolist())) for part in parts)
        print(
            f"{stage}: {dropped} of {total} records are left out: longer than "
            f"{settings.max_length} tokens"
        )
