"""Whether the models and batches of a run can be cut over its mesh, before anything is made."""

import math
from collections.abc import Mapping, Sequence

import jax

from ppo_jax.config import Config, PPOSettings
from ppo_jax.plan import Shape, parameters
from ppo_jax.sampling import Sampling
from ppo_jax.sharding import Layout, make_layouts


def check_mesh(config: Config, starts: Mapping[str, Shape], stages: Sequence[str]):
    """Every parameter and every batch of responses falls into equal pieces.

    Args:
        config: of the run.
        starts: what the stages start from, see `plan.find_starts`.
        stages: those that will run.

    Raises:
        ValueError: with the parameter or the field, and the axes of the mesh.
    """
    layouts = make_layouts(config.mesh)
    for shape in starts.values():
        for layout in layouts:
            layout.shardings(parameters(shape))
    if "ppo" in stages:
        check_rows(config.ppo, layouts)


def check_rows(settings: PPOSettings, layouts: Sequence[Layout]):
    """Every batch of responses falls into equal pieces.

    Args:
        settings: the ppo section.
        layouts: of the updates, and of the rollout.

    Raises:
        ValueError: with the field, and what it must be a multiple of.
    """
    s = settings
    piece = s.num_minibatches * s.num_micro_batches
    rows = math.lcm(*(layout.pieces("batch") for layout in layouts))
    if s.rollout_batch_size % (piece * rows):
        raise ValueError(
            f"ppo.rollout_batch_size must be a multiple of num_minibatches x num_micro_batches "
            f"x the {rows} pieces that the mesh cuts a batch into ({piece * rows}), got "
            f"{s.rollout_batch_size}"
        )
    sampling = Sampling(
        response_length=1, eos_ids=(), samples_per_prompt=s.samples_per_prompt, refill=s.refill
    )
    slots = s.slots or s.rollout_batch_size
    fields = {
        "ppo.rollout_batch_size / samples_per_prompt": s.rollout_batch_size // s.samples_per_prompt,
        "ppo.slots / samples_per_prompt": slots // s.samples_per_prompt,
    }
    if s.slots:
        fields["ppo.refill / samples_per_prompt"] = sampling.group(slots) // s.samples_per_prompt
    for field, value in fields.items():
        if value % rows:
            raise ValueError(
                f"{field} must be a multiple of the {rows} pieces that the mesh cuts a batch "
                f"into, got {value}"
            )


def share_of_a_device(layout: Layout, shape: Shape) -> float:
    """Which part of a model's parameters lies on one device."""
    leaves = jax.tree.leaves(parameters(shape))
    lies = jax.tree.leaves(layout.shardings(parameters(shape)))
    own = sum(math.prod(lie.shard_shape(x.shape)) for x, lie in zip(leaves, lies, strict=True))
    return own / sum(math.prod(x.shape) for x in leaves)
