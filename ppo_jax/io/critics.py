"""The critic that a PPO stage has trained: kept so that another run can start its own from it.

The checkpoints of the stage have what is trained of it, `value_params`. Beside them the folder has
`frozen_critic/` (what is not trained and not in the policy's `frozen/`), and stage.json its shape.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.config.run import ModelSettings
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import Params
from ppo_jax.distributed.layout import Layout
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import load_checkpoint_item, load_params, save_params
from ppo_jax.io.stage_folder import (
    Model,
    compute_as,
    config_values,
    describe_stage,
    device_put,
    find_source,
    has_begun,
    load_model,
    model_config,
    shardings_of,
    update_stage,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import merge_lora
from ppo_jax.models.partition import layer_range

FROZEN = "frozen_critic"


def keep_critic(
    folder: Path, config: ModelConfig, frozen: Params, trunk: int | None, *, shared: bool = False
):
    """Write what does not change of a critic while a stage trains, before its first checkpoint.

    Args:
        folder: of the stage, which has begun.
        config: the critic's shape.
        frozen: what is not trained of it, but for the layers of the trunk.
        trunk: how many of its lowest layers are the policy's, which are in `frozen/`; None is none.
        shared: it is a head on the policy's body, see `policy_value_network`.
    """
    if has_begun(folder):
        return
    if frozen:
        save_params(folder / FROZEN, frozen)
    kept = {"model": config_values(config), "frozen": bool(frozen), "trunk": trunk}
    kept |= {"shared": True} if shared else {}
    update_stage(folder, {"critic": kept})


def has_critic(description: Mapping[str, Any] | None) -> bool:
    """Whether what starts from a stage as a critic starts from its critic: a PPO stage."""
    return description is not None and description["stage"] == "ppo"


def critic_config(folder: Path) -> ModelConfig:
    """The shape of the critic of a PPO stage; adapters are in its weights.

    Raises:
        ValueError: it has none.
    """
    config = model_config(critic_description(folder)["model"])
    return dataclasses.replace(config, lora_alpha=0.0)


def critic_description(folder: Path) -> dict[str, Any]:
    """What stage.json keeps of the critic of a PPO stage.

    Raises:
        ValueError: it has none, or several.
    """
    description = describe_stage(folder)
    critic = description.get("critic")
    if (count := description["settings"].get("num_critics", 1)) > 1:
        raise ValueError(
            f"{folder} has {count} critics: start from a run with one, or from a model"
        )
    if critic is None:
        raise ValueError(
            f"{folder} has no critic to start from: it was trained without one, or before critics "
            "were kept; name a reward model or a policy"
        )
    return critic


def load_critic(
    name: str,
    workdir: Path,
    base: str,
    settings: ModelSettings,
    layout: Layout | None = None,
    step: int | None = None,
) -> Model:
    """The model that `critic_init_from` names, as `load_source`; of a PPO stage it is the critic.

    Raises:
        ValueError: as `load_source`, or the stage has no critic.
    """
    path, step = find_source(name, workdir, base, step)
    folder = Path(path)
    if not has_critic(describe_stage(folder)):
        return load_model(path, settings, layout, step)
    critic, shardings = critic_description(folder), shardings_of(layout)
    config = model_config(critic["model"])
    parts = [load_checkpoint_item(folder / "checkpoints", "value_params", step, shardings)]
    if critic.get("shared"):
        policy = load_model(path, settings, layout, step)
        head = device_put(parts[0]["value_head"], layout)
        return dataclasses.replace(policy, kind="reward", params={**policy.params, "head": head})
    if critic["frozen"]:
        parts.insert(0, load_params(folder / FROZEN, shardings))
    if critic["trunk"] is not None:
        parts.insert(0, trunk_of_policy(folder, config, critic["trunk"], layout))
    model = Model(
        kind="reward",
        config=critic_config(folder),
        params=device_put(merge_lora(config, merge_params(*parts)), layout),
        tokenizer=vocabulary.load_tokenizer(folder / "tokenizer"),
        layout=layout,
        step=step,
    )
    return compute_as(model, settings)


def trunk_of_policy(folder: Path, config: ModelConfig, depth: int, layout: Layout | None) -> Params:
    """The embeddings and the lowest layers, which the critic has in common with the policy."""
    frozen = load_params(folder / "frozen", shardings_of(layout))
    layers = layer_range(config, frozen["layers"], 0, depth)
    return {"embed": frozen["embed"], "layers": layers}
