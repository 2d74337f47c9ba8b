"""Responses of a stage's policy, or of any model: to prompts, to a file of prompts, or in a chat.

python experiments/generate.py --workdir=runs/quickstart --stage=ppo --prompt="The film is"
python experiments/generate.py --workdir=runs/quickstart --stage=ppo --prompts=a.jsonl --out=b.jsonl
python experiments/generate.py --model=package:smollm2-135m-instruct --interactive
"""

from ppo_jax.commands import generate

if __name__ == "__main__":
    generate.main()
