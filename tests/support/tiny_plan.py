"""A small config to plan, with a loop of two trips wherever an iteration has one, and its plan."""

import dataclasses
import functools

import jax

from ppo_jax.config.run import from_config_dict
from ppo_jax.planner import chips, planner

CHIP = dataclasses.replace(chips.find_chip("v5e"), name="fake", device_kind="cpu")
PHASES = ("rollout", "scoring", "update")
SCRATCH = dict(vocab_size=320, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=32)


def settings(**sections):
    """A small model over all three axes of a mesh; every loop of an iteration has two trips."""
    values = {
        "model": dict(
            scratch=SCRATCH,
            vocabulary_data="texts",
            scan_layers=True,
            remat="full",
            dtype="float32",
        ),
        "mesh": dict(data=2, fsdp=2, model=2),
        "ppo": dict(
            prompts="prompts.jsonl",
            init_from="base",
            reward_model="reward",
            rollout_batch_size=32,
            num_epochs=2,
            num_minibatches=2,
            num_micro_batches=2,
            max_prompt_length=8,
            response_length=8,
            value_learning_rate=1e-5,
            optimizer=dict(learning_rate=1e-5),
        ),
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes if changes else None
    return from_config_dict(values)


TARGET = planner.Target(name="fake", devices=jax.devices(), chip=CHIP)


@functools.cache
def make_plan():
    """The plan of `settings()`, compiled once for all tests."""
    return planner.make_plan(settings(), TARGET)


def on_a_chip_of(plan, memory):
    chip = dataclasses.replace(CHIP, usable_bytes=memory)
    return dataclasses.replace(plan, target=dataclasses.replace(TARGET, chip=chip))
