"""The mathematics of RLHF as functions of arrays.

Log-probs, KL estimates, rewards, advantages, losses, the optimizer, and `Network`, a policy or
critic as plain functions. Pure: imports jax, flax, optax, chex and nothing of this library.
Start with `losses` and `advantages`.
"""
