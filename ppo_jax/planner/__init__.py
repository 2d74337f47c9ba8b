"""Memory and cost of a PPO iteration on devices that are elsewhere.

`planner` compiles for a topology, `phases` are the programs, `chips` the published figures, `flops`
the analytic count, `hlo` reads compiled programs. Imports every package but `commands`.
Start with `planner`.
"""
