"""Memory and cost of a PPO iteration on a given topology, from compilation alone.

`planner` compiles for a topology, `phases` are the programs, `chips` the published figures, `flops`
the analytic count, `hlo` reads compiled programs. Imports every package but `commands`.
Start with `planner`.
"""
