"""Tasks whose reward is a fact, by Python reward functions: reviews that mention the acting, sums.

    python experiments/rlhf.py --config=configs/verifiable.py --workdir=runs/verifiable

A small model from scratch learns to write film sentences, then PPO raises the share of responses
with "acting", "actor", "actress", "performance" or "cast" in them. Two minutes on two cores; expect
`reward/score_mean` to rise from 0.02 to 0.97 or more of 1. Seeds: --config.seed=1.

    python experiments/rlhf.py --config=configs/verifiable.py:reasoning --workdir=runs/reasoning

needs `pip install 'ppo_jax[reasoning]'`. Its rows have answers: a model that has imitated solved
sums of two digits gets sums that it has not seen, and the scorer of `reasoning-gym` gets the row's
answer beside the response. A second function, with a weight of its own, pays for an end. Five
minutes on two busy cores; `reward/score` rises from 0.19 to 0.46 of 1 (means of five iterations).
"""

from ml_collections import config_dict

from ppo_jax.config import with_defaults


def get_config(variant: str = "acting") -> config_dict.ConfigDict:
    variants = {"acting": acting, "reasoning": reasoning}
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}; choose from {sorted(variants)}")
    return with_defaults(variants[variant]())


def acting() -> dict:
    return dict(
        seed=0,
        prepare="film_reviews:prepare",  # writes {workdir}/data
        model=dict(
            scratch=dict(vocab_size=1024, num_layers=2, embed_dim=128, num_heads=4, mlp_dim=384),
            vocabulary_data="{workdir}/data/sft.jsonl",
        ),
        sft=dict(
            data="{workdir}/data/sft.jsonl",
            num_epochs=1.0,  # passes over the data
            batch_size=32,  # texts
            max_length=64,  # tokens
            optimizer=dict(learning_rate=2e-3, warmup_steps=10),
        ),
        ppo=dict(
            prompts="{workdir}/data/prompts.jsonl",
            reward_model="",
            reward_function="film_reviews:mentions_acting",
            num_iterations=60,
            rollout_batch_size=128,  # episodes
            num_epochs=2,  # passes over a rollout
            num_minibatches=2,  # optimizer steps a pass
            max_prompt_length=40,  # tokens
            response_length=24,  # tokens
            kl_coef=0.01,  # reward per nat
            sample_every=10,  # iterations
            save_every=20,  # iterations
            value_learning_rate=1e-3,
            optimizer=dict(learning_rate=1e-3, schedule="linear"),
        ),
    )


def reasoning() -> dict:
    values = acting()
    values["prepare"] = "reasoning:prepare"
    values["sft"] |= dict(num_epochs=60.0, max_length=32)
    values["model"]["scratch"] |= dict(vocab_size=320)
    values["ppo"] |= dict(
        reward_function="",
        reward_functions=("reasoning:score", "reasoning:short"),
        reward_weights=(1.0, 0.1),
        max_prompt_length=24,
        response_length=4,
        num_iterations=80,
        kl_coef=0.001,
        entropy_coef=0.01,
    )
    return values


def sweep():
    for seed in range(3):
        yield {"seed": seed}
