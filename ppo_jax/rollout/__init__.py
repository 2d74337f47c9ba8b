"""Sampling responses from a policy as one program.

`decode` is the plain loop, `sampling` chooses tokens, `continuous_batching` refills finished rows,
`rollout` picks between the two loops, `packing` lets responses share rows in the update. Pure:
imports `core` alone, knows a `Network` and no Transformer. Start with `decode`.

The attribute `ppo_jax.rollout` is the function of that name: write `from ppo_jax.rollout import
Sampling`, not `ppo_jax.rollout.Sampling`.
"""

from ppo_jax.rollout.decode import response_outputs, response_statistics
from ppo_jax.rollout.rollout import rollout
from ppo_jax.rollout.sampling import Sampling, sample

__all__ = [
    "Sampling",
    "response_outputs",
    "response_statistics",
    "rollout",
    "sample",
]
