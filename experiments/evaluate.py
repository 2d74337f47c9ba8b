"""Policies side by side on unseen prompts: stages, their steps, models, best-of-n; by any judges.

python experiments/evaluate.py --run=runs/quickstart --workdir=runs/quickstart_evaluated
python experiments/evaluate.py --run=runs/quickstart --workdir=runs/best_of_n \
    --policies="sft=runs/quickstart/sft; best4=bon(runs/quickstart/sft, n=4)" --seeds=0:3
"""

from ppo_jax.commands import evaluate

if __name__ == "__main__":
    evaluate.main()
