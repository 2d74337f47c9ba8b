"""The training loops of SFT, reward model and PPO.

`stage` restores, logs, saves and stops around every step; `sft`, `reward` and `ppo` are the loops;
`metrics` writes them; `resume` refuses changed data. Imports `inference` and below.
Start with `stage`, then `ppo`.
"""
