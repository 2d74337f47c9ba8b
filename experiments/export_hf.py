"""A finished stage as a Hugging Face folder: weights, tokenizer, generation config, model card.

With --adapter_of, the adapter of a policy alone, as a folder that peft loads.

python experiments/export_hf.py --workdir=runs/quickstart --stage=ppo --out=exported/film-policy
"""

from ppo_jax.commands import export

if __name__ == "__main__":
    export.main()
