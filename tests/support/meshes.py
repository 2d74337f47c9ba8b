"""Meshes of the eight fake devices, layouts on them, and a model that fits."""

import jax
import numpy as np

from ppo_jax.config.mesh import RULES, MeshSettings
from ppo_jax.distributed.layout import Layout, make_mesh

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
# Sizes of a model that each of them divides.
WIDE = dict(vocab_size=64, num_heads=8, num_kv_heads=8, embed_dim=64, mlp_dim=64)


def mesh_of(shape):
    """The mesh of (data, fsdp, model) on as many devices as it needs."""
    settings = MeshSettings(**dict(zip(("data", "fsdp", "model"), shape, strict=True)))
    return make_mesh(settings, jax.devices()[: int(np.prod(shape))])


def layout_of(shape, rules=RULES):
    return Layout(mesh_of(shape), rules)
