"""Over-optimisation: gold and proxy score against sqrt(KL), of several runs and best-of-n.

python experiments/frontier.py --runs=runs/kl --out=runs/kl/frontier
python experiments/frontier.py --runs="runs/kl_*" --evaluation=runs/best_of_n --out=frontier
"""

from ppo_jax.commands import frontier

if __name__ == "__main__":
    frontier.main()
