"""A reward model on your preferences, or on ratings.

    python experiments/train_reward.py --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=MODEL --config.reward.data=preferences.jsonl

A line of preferences.jsonl is {"prompt": ..., "chosen": ..., "rejected": ...}, or a ranking,
{"prompt": ..., "responses": [best, ..., worst]} (batch_size is a multiple of their number); with
--config.reward.format=ratings it is {"text": ..., "ratings": [...]}. Read the result in
`reward_model/validation_accuracy` of metrics.jsonl: on film reviews 0.90 of the pairs with a gap of
one or more (configs/quickstart.py, twelve minutes on two cores).

From a small model that configs/sft.py:scratch has made in runs/small:

    python experiments/train_reward.py --config=configs/reward.py:scratch \
        --workdir=runs/small_reward --config.reward.data=preferences.jsonl
"""

from ml_collections import config_dict

from ppo_jax.config import with_defaults


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    variants = {"default": default, "scratch": scratch}
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}; choose from {sorted(variants)}")
    return with_defaults(variants[variant]())


def scratch() -> dict:
    """For a model of a few million parameters on a CPU, as configs/sft.py:scratch makes it."""
    config = default()
    config["reward"].update(
        init_from="runs/small/sft",  # model.path is then not read
        batch_size=32,
        max_length=128,
        eval_every=20,
    )
    config["reward"]["optimizer"].update(learning_rate=3e-4, warmup_steps=5)
    return config


def default() -> dict:
    return dict(
        seed=0,
        model=dict(
            path="package:smollm2-135m-instruct",
            dtype="float32",  # "bfloat16" on accelerators
            scan_layers=False,  # True compiles faster and suits accelerators
        ),
        reward=dict(
            data="preferences.jsonl",
            format="preferences",  # or "ratings"
            init_from="base",  # or the folder of an SFT stage
            validation_data="",  # "" holds out the fraction below
            validation_fraction=0.05,
            reference_data="",  # texts that shall score 0 on average; "" is the held-out data
            num_layers=0,  # keep the lowest N layers; 0 keeps all
            trainable="all",  # or a number of top layers, "head" or "lora"
            num_epochs=1.0,  # passes over the data; more than one soon overfits
            batch_size=64,  # texts; a multiple of the responses to a prompt, two in a pair
            num_micro_batches=1,  # more need less memory
            max_length=512,  # tokens
            eval_every=50,  # steps
            save_every=100,  # steps
            optimizer=dict(learning_rate=1e-5, schedule="cosine", warmup_steps=20),
        ),
    )


def sweep():
    for seed in range(3):
        for learning_rate in (5e-6, 1e-5):
            yield {"seed": seed, "reward.optimizer.learning_rate": learning_rate}
