"""What is refused before a run begins, so that nothing fails in its third stage after an hour."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ppo_jax.config.objectives import needs_critic
from ppo_jax.config.parsing import load_function
from ppo_jax.config.ppo import PPOSettings, names_critic
from ppo_jax.config.run import STAGE_NAMES, Config
from ppo_jax.config.stages import LoRASettings, RewardSettings
from ppo_jax.data.comparisons import RewardData
from ppo_jax.data.encode import TokenizedTexts
from ppo_jax.data.preferences import PREFERENCE_SCHEMAS
from ppo_jax.data.readers import check_packages, is_hub, is_table, read_rows
from ppo_jax.data.records import PROMPT_SCHEMAS, load_ratings, load_texts
from ppo_jax.data.templates import read_template
from ppo_jax.distributed.layout import Layout, make_layouts
from ppo_jax.evaluation.during_training import make_judging, training_prompts
from ppo_jax.evaluation.evaluate import EVALUATE
from ppo_jax.inference.stop_strings import stop_strings
from ppo_jax.io.hub import HUB_ID
from ppo_jax.io.model_spec import (
    ModelSpec,
    needs_base,
    other_specs,
    parameters,
    reread_reason,
    scratch_shape,
)
from ppo_jax.io.stage_folder import (
    check_pin,
    check_step,
    describe_stage,
    missing_steps,
    other_field,
    resolve,
    source_steps,
    split_step,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import check_targets
from ppo_jax.models.partition import trains_experts
from ppo_jax.pipeline.scorers import check_others, check_text_reward, reads_eos
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.objectives import check_objectives
from ppo_jax.training.ppo import PPO, train_ppo
from ppo_jax.training.ppo_setup import critic_source
from ppo_jax.training.reward_functions import load_reward_functions
from ppo_jax.training.sft import router_coef
from ppo_jax.training.stage import Stage
from ppo_jax.training.stages import TRAINING_STAGES
from ppo_jax.training.writers import check_writers

# In the order in which they run. PPO is judged while it trains by what comes after training.
STAGES = (
    *(x for x in TRAINING_STAGES if x is not PPO),
    dataclasses.replace(PPO, train=functools.partial(train_ppo, judging=make_judging)),
    EVALUATE,
)


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of these names, in their order."""
    return [stage for stage in STAGES if stage.name in names]


def check_named(config: Config, workdir: Path, stages: Sequence[str], *, files: bool = True):
    """All that the config names is there, or will be: before anything is fetched or made.

    Args:
        config: of the run.
        workdir: the run's folder.
        stages: those that will run.
        files: read the data files; not for a point of a sweep whose files another one has, too.

    Raises:
        ValueError: a function, a package, a file or a stage is missing.
    """
    if config.model.scratch is not None:
        check_scratch(config, stages)
    check_functions(config, stages)
    check_writers(config.writers)
    check_template(config, workdir)
    if files:
        check_files(config, workdir, stages)
    check_sources(config, workdir, stages)


def check_run(
    config: Config, starts: Mapping[str, ModelSpec], stages: Sequence[str]
) -> dict[str, Any]:
    """Check the stages against the models that they start from, and the data.

    Returns:
        What the stages read, see `check_data`.

    Raises:
        ValueError: a stage could not run when its turn comes.
    """
    for stage in ("sft", "ppo"):
        if stage in stages:
            check_policy(stage, config, starts[stage])
    if "reward" in stages:
        check_reward(config, starts["reward"])
    if "ppo" in stages:
        check_ppo(config.ppo, starts["ppo"], starts.get("score"), starts.get("critic"))
        check_others(config.ppo, starts["ppo"], starts.get("score"), other_specs(starts))
    return check_data(config, starts, stages)


def check_functions(config: Config, stages: Sequence[str]):
    """The functions that the config names can be imported, and those of arrays can be called."""
    if config.prepare:
        load_function(config.prepare, "prepare")
    if "ppo" in stages:
        load_reward_functions(config.ppo)
        check_objectives(config.ppo)
    if is_judged(config, stages):
        load_function(config.evaluate.judges, "evaluate.judges")


def is_judged(config: Config, stages: Sequence[str]) -> bool:
    """Whether the judges of the config are asked, be it while PPO trains."""
    while_training = "ppo" in stages and config.ppo.evaluate_every
    return bool(while_training or ("evaluate" in stages and config.evaluate.judges))


def check_files(config: Config, workdir: Path, stages: Sequence[str]):
    """The data files are there, but for those that `prepare` will write."""
    named = {
        f"{stage.name}.{field}": getattr(getattr(config, stage.name), field)
        for stage in chosen(stages)
        for field in stage.data_fields
    }
    if is_judged(config, stages):
        named["evaluate.prompts"] = config.evaluate.prompts
    if needs_base(config, stages):
        named["model.vocabulary_data"] = config.model.vocabulary_data
    for field, path in named.items():
        comes_later = config.prepare and Path(path).is_relative_to(workdir / "data")
        if not path or comes_later:
            continue
        if not is_hub(path) and not Path(path).is_file():
            why = "a folder" if Path(path).is_dir() else "not there"
            raise ValueError(f"{field} must be a file, got {path!r}, which is {why}")
        check_packages(path)
        if not is_table(path):  # its rows are read one by one when their turn comes
            check_rows(field, path, config)


def check_template(config: Config, workdir: Path):
    """The file of the chat template is there, unless `prepare` will write it."""
    path = config.model.chat_template
    if path and not (config.prepare and Path(path).is_relative_to(workdir / "data")):
        read_template(path)


def check_rows(field: str, path: str, config: Config):
    """Every line is as it must be, as far as can be seen without a tokenizer."""
    section, name = field.split(".")
    rates = section == "reward" and name != "reference_data" and config.reward.format == "ratings"
    if rates or name == "ratings":
        load_ratings(path)
    elif section == "reward" and name != "reference_data":
        collections.deque(read_rows(path, PREFERENCE_SCHEMAS), maxlen=0)
    elif name == "prompts":
        collections.deque(read_rows(path, PROMPT_SCHEMAS), maxlen=0)
    else:
        load_texts(path)


def check_sources(config: Config, workdir: Path, stages: Sequence[str]):
    """What a stage starts from is there, or is made by a stage before it."""
    read = {
        stage.name: [f"{stage.name}.{field}" for field in stage.source_fields]
        for stage in chosen(stages)
    }
    if "ppo" not in stages:
        read["evaluate"] = ["ppo.init_from"]
    for stage in stages:
        for field, name, named in named_sources(config, read.get(stage, [])):
            value, step = split_step(named)
            if name == "critic_init_from" and not names_critic(config.ppo):
                continue
            pin = source_steps(workdir / field.split(".")[0]).get(name)
            if pin is not None and value not in STAGE_NAMES:
                check_pin(Path(value), pin)
            elif step is not None and value not in stages[: stages.index(stage)]:
                check_step(Path(resolve(value, workdir, "")), step)
            elif value in STAGE_NAMES:
                check_stage_name(field, value, workdir, stages[: stages.index(stage)])
            elif value and not (value == "base" and name.endswith("init_from")):
                check_path(field, value)
    if config.model.path and describe_stage(Path(config.model.path)):
        raise ValueError(
            f"model.path must be a model, got the stage folder {config.model.path!r}: name it as "
            "sft.init_from, reward.init_from or ppo.init_from"
        )


def named_sources(config: Config, fields: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(setting, its name among `source_steps`, what it names); of a tuple each of its entries."""
    for field in fields:
        section, name = field.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, tuple):
            yield from ((field, other_field(i), x) for i, x in enumerate(value))
        else:
            yield field, name, value


def check_stage_name(field: str, value: str, workdir: Path, before: Sequence[str]):
    """A stage of this run has run, or comes before the one that reads it."""
    if value not in before and (missing := missing_steps(workdir / value)):
        raise ValueError(
            f"{field}={value!r} needs the stage {value}, but {missing}: give the config a section "
            f"for it that comes before, or run it in {workdir} first"
        )


def check_path(field: str, value: str):
    """A model is there, a stage from elsewhere complete; a run's folder is none of its stages."""
    folder = Path(value)
    if describe_stage(folder) is not None:
        if missing := missing_steps(folder):
            raise ValueError(f"{field}={value!r} is not complete: {missing}")
        return
    if stages := [stage for stage in STAGE_NAMES if describe_stage(folder / stage) is not None]:
        raise ValueError(f"{field} must be a stage, got the run {value!r}; it has {stages}")
    if not (folder.exists() or value.startswith("package:") or HUB_ID.fullmatch(value)):
        raise ValueError(f"{field}: there is no folder or .gguf file {value}")


def check_scratch(config: Config, stages: Sequence[str]):
    """What the stages ask of a model from scratch, before it is made."""
    shape = scratch_shape(config.model.scratch)
    start = {stage: getattr(getattr(config, stage), "init_from", "base") for stage in stages}
    start = {stage: split_step(name)[0] for stage, name in start.items()}
    mine = [stage for stage in ("sft", "reward", "ppo") if start.get(stage) in ("base", "sft")]
    for stage in mine:
        check_reward(config, shape) if stage == "reward" else check_policy(stage, config, shape)
    if "ppo" in mine and not config.ppo.reward_model:
        check_ppo(config.ppo, shape, None)


def check_data(
    config: Config, starts: Mapping[str, ModelSpec], stages: Sequence[str]
) -> dict[str, Any]:
    """Read and tokenise the data of every stage, so that a bad file stops the run at once.

    Returns:
        {stage name: what its `read` returns}.
    """
    if "ppo" in starts:
        stop_strings(starts["ppo"].tokenizer, config.ppo.stop_tokens)
    data: dict[str, Any] = {}
    for stage in chosen(stages):
        start = starts["ppo" if stage.name == "evaluate" else stage.name]
        data[stage.name] = stage.read(config, start)
        check_sizes(stage.name, config, data[stage.name], start.config.max_length)
    if "ppo" in stages and config.ppo.evaluate_every:
        training_prompts(config, starts["ppo"].tokenizer)
    return data


def check_sizes(stage: str, config: Config, data: Any, context: int):
    """Texts fit the model's context, and batches the data."""
    if stage == "sft":
        check_texts("sft", config.sft, data, context, len(data[0].mask))
    elif stage == "reward":
        check_rankings(config.reward, data[0])
        texts = [part.texts for part in data[:2]]
        check_texts("reward", config.reward, texts, context, data[0].num_rows)


def check_rankings(settings: RewardSettings, data: RewardData):
    """Whole rankings fit into a batch: all responses to a prompt are in the same one."""
    size = 1 if data.groups is None else data.groups.rows.shape[1]
    if settings.batch_size % size:
        raise ValueError(
            f"reward.batch_size must be a multiple of {size}, the most responses to a prompt of "
            f"{settings.data}, got {settings.batch_size}"
        )


def check_texts(stage: str, settings, parts: Sequence[TokenizedTexts], context: int, num_rows: int):
    """Refuse texts beyond the model's context and batches beyond the data."""
    what = "text" if parts[0].segment_ids is None else "packed row"
    longest = max(int(part.mask.sum(axis=1).max()) for part in parts)
    if longest > context:
        raise ValueError(
            f"{stage}.max_length must be at most {context} (the model's context), got "
            f"{settings.max_length}: a {what} has {longest} tokens"
        )
    if settings.batch_size > num_rows:
        raise ValueError(
            f"{stage}.batch_size must be at most {num_rows}, the {what}s to train on, got "
            f"{settings.batch_size}"
        )


def check_policy(stage: str, config: Config, start: ModelSpec):
    """A stage that trains a policy has one, and has what is to be trained."""
    trainable = getattr(config, stage).trainable
    if start.kind != "policy":
        name = getattr(getattr(config, stage), "init_from", "base")
        field = f"{stage}.init_from"
        if name == "base":
            field, name = "model.path", config.model.path
        raise ValueError(f"{field} must be a policy, got {name!r}, which scores texts")
    if trainable == "head" and start.config.tie_embeddings:
        raise ValueError(
            f"{stage}.trainable must be 'all', 'lora' or a number of top layers for a model that "
            "ties its head to the token table, got 'head'"
        )
    check_part(f"{stage}.trainable", trainable, getattr(config, stage).lora, start.config)
    if stage == "sft":
        router_coef(config.sft, start.config)


def check_reward(config: Config, start: ModelSpec):
    """A reward model has the layers that are kept, and of them what is to be trained."""
    settings, depth = config.reward, start.config.num_layers
    check_depth("reward.num_layers", settings.num_layers, depth)
    lower = dataclasses.replace(start.config, num_layers=settings.num_layers or depth)
    check_part("reward.trainable", settings.trainable, settings.lora, lower)


def check_ppo(
    settings: PPOSettings,
    policy: ModelSpec,
    score: ModelSpec | None,
    named: ModelSpec | None = None,
):
    """Lengths fit the policy; the reward model scores, and reads what the policy writes, as a
    critic that is named does."""
    reason = reread_reason(policy, score) if score else ""
    readers = [policy] if score is None or reason else [policy, score]
    context = min(reader.config.max_length for reader in readers)
    total = settings.max_prompt_length + settings.response_length
    if total > context:
        raise ValueError(
            f"ppo.max_prompt_length + ppo.response_length must be at most {context} (the models' "
            f"context), got {settings.max_prompt_length} + {settings.response_length}"
        )
    if settings.replay_experts and not trains_experts(policy.config, settings.trainable):
        raise ValueError(
            "ppo.replay_experts must be False where no layer with experts is trained "
            f"(ppo.trainable={settings.trainable!r}), got True"
        )
    reads_tokens = score is not None and not reason
    if reads_tokens and total == score.config.max_length and reads_eos(settings, policy):
        raise ValueError(
            "ppo.score_at must be 'last', or ppo.max_prompt_length + ppo.response_length below the "
            f"reward model's context ({total}): an EOS is put behind the longest response, too"
        )
    if score is not None and score.kind != "reward":
        raise ValueError(
            f"ppo.reward_model must be a reward model, got the policy {settings.reward_model!r}"
        )
    if reason:
        check_text_reward(settings, score, reason)
    if named is not None:
        check_critic(settings, policy, named)
    if needs_critic(settings.advantage) and bool(named) == names_critic(settings):
        critic = critic_source(settings, policy, score, named)
        check_part("ppo.value_trainable", settings.value_trainable, settings.lora, critic.config)


def check_critic(settings: PPOSettings, policy: ModelSpec, critic: ModelSpec):
    """A critic from elsewhere reads the policy's tokens, as many as there are."""
    given = "ppo.critic_init_from must be a model with the policy's tokens, got "
    if reason := reread_reason(policy, dataclasses.replace(critic, padding_id=None)):
        raise ValueError(f"{given}{settings.critic_init_from!r}: {reason}")
    total, most = (
        settings.max_prompt_length + settings.response_length,
        critic.config.max_length,
    )
    if total > most:
        raise ValueError(
            f"ppo.max_prompt_length + ppo.response_length must be at most {most} (the context of "
            f"the critic, {settings.critic_init_from}), got {total}"
        )
    own, asked = ((x.value_bins, list(map(float, x.value_range))) for x in (critic, settings))
    if own[0] and own != asked:
        raise ValueError(
            "ppo.value_bins and ppo.value_range must be those of the critic that it starts from, "
            f"{own[0]} and {own[1]}, got {asked[0]} and {asked[1]}"
        )


def check_part(field: str, trainable: str | int, lora: LoRASettings, config: ModelConfig):
    """What is to be trained is in the model: so many layers, or the places of the adapters."""
    check_depth(field, trainable, config.num_layers)
    if trainable == "lora":
        stage, width = field.split(".")[0], config.embed_dim
        check_targets(config, lora.targets, f"{stage}.lora.targets")
        if lora.rank > width:
            raise ValueError(
                f"{stage}.lora.rank must be at most {width}, the model's width, got {lora.rank}"
            )


def check_depth(field: str, count: str | int, depth: int):
    if isinstance(count, int) and count > depth:
        raise ValueError(f"{field} must be at most {depth}, the model's layers, got {count}")


def check_mesh(config: Config, starts: Mapping[str, ModelSpec], stages: Sequence[str]):
    """The mesh can shard every parameter and every batch of responses.

    Raises:
        ValueError: with the parameter or the field, and the axes of the mesh.
    """
    layouts = make_layouts(config.mesh)
    for shape in starts.values():
        for layout in layouts:
            layout.shardings(parameters(shape))
    if "ppo" in stages:
        check_batch_rows(config.ppo, layouts)
        shards, bins = layouts[0].num_shards("vocab"), config.ppo.value_bins
        if bins % shards:
            raise ValueError(
                f"ppo.value_bins must be a multiple of the {shards} shards of the vocabulary, got "
                f"{bins}"
            )


def check_batch_rows(settings: PPOSettings, layouts: Sequence[Layout]):
    """The mesh can shard every batch of responses.

    Raises:
        ValueError: with the field, and what it must be a multiple of.
    """
    s = settings
    parts = s.num_minibatches * s.num_micro_batches
    shards = math.lcm(*(layout.num_shards("batch") for layout in layouts))
    if s.update_batch_size % (parts * shards):
        part = " / samples_per_prompt x keep_samples" if s.keep_samples else ""
        raise ValueError(
            f"ppo.rollout_batch_size{part} must be a multiple of num_minibatches x "
            f"num_micro_batches x the {shards} shards of a batch ({parts * shards}), got "
            f"{s.update_batch_size}"
        )
    sampling = Sampling(
        response_length=1,
        eos_ids=(),
        samples_per_prompt=s.samples_per_prompt,
        min_free_slots=s.min_free_slots,
    )
    slots = s.max_concurrent or s.rollout_batch_size
    fields = {
        "ppo.rollout_batch_size / samples_per_prompt": s.rollout_batch_size // s.samples_per_prompt,
        "ppo.max_concurrent / samples_per_prompt": slots // s.samples_per_prompt,
    }
    if s.max_concurrent:
        fields["ppo.min_free_slots / samples_per_prompt"] = (
            sampling.group(slots) // s.samples_per_prompt
        )
    for field, value in fields.items():
        if value % shards:
            raise ValueError(
                f"{field} must be a multiple of the {shards} shards of a batch, got {value}"
            )


def share_of_a_device(layout: Layout, shape: ModelSpec) -> float:
    """The share of a model's parameters on one device."""
    leaves = jax.tree.leaves(parameters(shape))
    shardings = jax.tree.leaves(layout.shardings(parameters(shape)))
    own = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(leaves, shardings, strict=True))
    return own / sum(math.prod(x.shape) for x in leaves)
