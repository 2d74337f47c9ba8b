"""Sampling responses from a policy as one program.

`decode` is the plain loop, `sampling` chooses tokens, `continuous_batching` refills finished rows,
`rollout` picks between the two loops, `packing` lets responses share rows in the update. Pure:
imports `core` alone, knows a `Network` and no Transformer. Start with `decode`.
"""
