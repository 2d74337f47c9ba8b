"""Many runs of one config: the points of a grid, of chance, or of the config's own `sweep()`.

python experiments/sweep.py --config=configs/quickstart.py:tiny --workdir=runs/tiny_kl \
    --grid="ppo.kl_coef=0,0.02,0.05,0.2; seed=0:3"

A point is an ordinary run in a folder of its own. What points have in common (data, base model,
SFT, reward model) is made once. The same command again goes on; see docs/sweeps.md.
"""

from ppo_jax.commands import sweep

if __name__ == "__main__":
    sweep.main()
