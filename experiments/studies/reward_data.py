"""How many comparisons a reward model needs.

    python experiments/sweep.py --config=experiments/studies/reward_data.py:tiny \
        --workdir=runs/reward_data

Reward models on 250 to 8,000 comparisons of two sentences, each by one human rating of either;
three learning rates and three seeds for each number. Their accuracy is the share of 2,000 pairs of
unseen sentences, with a gap of 1 or more between their mean ratings, that they order as the means
do; a human rater orders 94.3% of such pairs so. Expect it to rise with every doubling, by less and
less.
"""

from pathlib import Path

import numpy as np
from film_reviews import data

from ppo_jax.data.ratings import held_out_pairs
from ppo_jax.data.records import RatedText, load_ratings, write_jsonl
from studies import quickstart

SIZES = (250, 500, 1000, 2000, 4000, 8000)  # comparisons
UNSEEN = 2000


def get_config(variant: str = "default"):
    config = quickstart(variant)
    config.prepare = "studies.reward_data:prepare"
    config.ppo, config.evaluate = None, None
    config.reward.update(
        data="{workdir}/data/pairs_8000.jsonl",
        validation_data="{workdir}/data/unseen_pairs.jsonl",
        format="preferences",
        num_epochs=1.0,
        eval_every=1000,  # steps: the last one is always validated
    )
    return config


def sweep():
    for size in SIZES:
        for rate in (3e-4, 1e-3, 3e-3):
            for seed in range(3):
                yield {
                    "reward.data": f"{{workdir}}/data/pairs_{size}.jsonl",
                    "reward.optimizer.learning_rate": rate,
                    "seed": seed,
                }


def prepare(folder: Path):
    """The quickstart's files, and comparisons of every number."""
    data.prepare(folder)
    pairs = comparisons(load_ratings(folder / "train_ratings.jsonl"), max(SIZES), seed=0)
    for size in SIZES:
        write_jsonl(folder / f"pairs_{size}.jsonl", pairs[:size])
    unseen = load_ratings(folder / "test_ratings.jsonl")
    means = np.array([record.mean for record in unseen])
    chosen = held_out_pairs(means, 0, num_pairs=UNSEEN, min_gap=1)
    write_jsonl(
        folder / "unseen_pairs.jsonl", [pair(unseen[i].text, unseen[j].text) for i, j in chosen]
    )


def comparisons(records: list[RatedText], count: int, seed: int) -> list[dict[str, str]]:
    """Rows of preferences: two sentences, of which one got the higher rating by one person each."""
    draw, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        a, b = (records[i] for i in draw.choice(len(records), 2, replace=False))
        of_a, of_b = draw.choice(a.ratings), draw.choice(b.ratings)
        if of_a != of_b:
            rows.append(pair(a.text, b.text) if of_a > of_b else pair(b.text, a.text))
    return rows


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": "", "chosen": chosen, "rejected": rejected}
