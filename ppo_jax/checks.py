"""What is refused before a run begins, so that nothing fails in its third stage after an hour."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax import hf, vocabulary
from ppo_jax.batches import Texts, encode_prompts
from ppo_jax.config import STAGES, Config
from ppo_jax.data import load_prompts
from ppo_jax.evaluate import evaluation_prompts
from ppo_jax.generation import stop_ids
from ppo_jax.loops import reward_data, sft_data
from ppo_jax.models import describe_stage, missing_steps
from ppo_jax.networks import ModelConfig
from ppo_jax.plugins import load_function
from ppo_jax.ppo_loop import check_lengths


def check_run(config: Config, workdir: Path, base: str, stages: Sequence[str]):
    """Check the stages against each other, the base model and the data.

    Args:
        config: of the run.
        workdir: the run's folder, which may hold stages already.
        base: path of the base model.
        stages: those that will run, in their order.

    Raises:
        ValueError: a stage could not run when its turn comes.
    """
    model, tokenizer = hf.load_config(base), vocabulary.load_tokenizer(base)
    check_sources(config, workdir, stages)
    check_head(config, model, stages)
    check_sizes(config, model, stages)
    check_functions(config, stages)
    check_data(config, model, tokenizer, stages)


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
            path_given = field == "reward_model" and name and name not in STAGES
            if path_given and describe_stage(Path(name)) is None:
                raise ValueError(f"ppo.reward_model must be a stage or its folder, got {name!r}")


def check_sizes(config: Config, model: ModelConfig, stages: Sequence[str]):
    """Layers and lengths fit the base model; a model from elsewhere is checked when it is read."""
    own = ("base", "sft")
    depth, reward_depth = model.num_layers, None
    if "sft" in stages:
        check_depth("sft.trainable", config.sft.trainable, depth)
    if config.reward is not None and config.reward.init_from in own:
        reward_depth = config.reward.num_layers or depth
        check_depth("reward.num_layers", reward_depth, depth)
        check_depth("reward.trainable", config.reward.trainable, reward_depth)
    if "ppo" in stages and config.ppo.init_from in own:
        check_lengths(config.ppo, model.max_length)
        check_depth("ppo.trainable", config.ppo.trainable, depth)
        if config.ppo.reward_function:
            check_depth("ppo.value_trainable", config.ppo.value_trainable, depth)
        elif config.ppo.reward_model == "reward" and reward_depth is not None:
            check_depth("ppo.value_trainable", config.ppo.value_trainable, reward_depth)


def check_head(config: Config, model: ModelConfig, stages: Sequence[str]):
    """A policy whose head is its token table has no head to train alone."""
    for stage in ("sft", "ppo"):
        if stage in stages and getattr(config, stage).trainable == "head" and model.tie_embeddings:
            raise ValueError(
                f"{stage}.trainable must be 'all' or a number of top layers for a model that ties "
                "its head to the token table, got 'head'"
            )


def check_depth(field: str, count: str | int, depth: int):
    if isinstance(count, int) and count > depth:
        raise ValueError(f"{field} must be at most {depth}, the model's layers, got {count}")


def check_functions(config: Config, stages: Sequence[str]):
    """The functions that the config names can be imported."""
    if "ppo" in stages and config.ppo.reward_function:
        load_function(config.ppo.reward_function, "ppo.reward_function")
    if "evaluate" in stages and config.evaluate.judges:
        load_function(config.evaluate.judges, "evaluate.judges")


def check_data(config: Config, model: ModelConfig, tokenizer: Any, stages: Sequence[str]):
    """Read and tokenise the data of every stage, so that a bad file stops the run at once."""
    if "sft" in stages:
        parts = sft_data(config.sft, config.seed, tokenizer)
        check_texts("sft", parts, config.sft.max_length, model.max_length)
    if "reward" in stages:
        data = reward_data(config.reward, config.seed, tokenizer, model.max_length)
        parts = [part.texts for part in data]
        check_texts("reward", parts, config.reward.max_length, model.max_length)
    length = config.ppo and config.ppo.max_prompt_length
    if "ppo" in stages:
        encode_prompts(load_prompts(config.ppo.prompts), tokenizer, max_length=length)
        stop_ids(tokenizer, config.ppo.stop_tokens)
    if "evaluate" in stages:
        encode_prompts(evaluation_prompts(config.evaluate), tokenizer, max_length=length)


def check_texts(stage: str, parts: Sequence[Texts], max_length: int, context: int):
    """Refuse texts beyond the model's context, and tell how many were left out."""
    longest = max(int(part.mask.sum(axis=1).max()) for part in parts)
    if longest > context:
        raise ValueError(
            f"{stage}.max_length must be at most {context} (the model's context), got "
            f"{max_length}: a text has {longest} tokens"
        )
    if dropped := sum(part.num_dropped for part in parts):
        print(f"{stage}: {dropped} records of more than {max_length} tokens are left out")
