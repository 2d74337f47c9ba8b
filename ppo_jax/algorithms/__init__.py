"""Training steps: SFT, reward model, and the PPO iteration.

`supervised` has the steps on texts and preferences, `experience` goes from prompts to advantages,
`ppo` is the update and one whole iteration. Pure: imports `core` and `rollout`; knows a `Network`
and no Transformer. Start with `ppo`.
"""
