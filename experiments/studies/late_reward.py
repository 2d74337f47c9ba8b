"""A reward that comes late: responses of 128 tokens, a score behind the last, and what the critic
needs for it. The ablation of VC-PPO in small.

    python experiments/sweep.py --config=experiments/studies/late_reward.py:tiny \
        --workdir=runs/late_reward --vectorize

A model from scratch writes several film sentences; the score is 1 if one of them mentions the
acting, wherever. With lambda 0.95 a reward 64 tokens ahead counts 0.04 of itself, and what is left
has to come through the critic, which starts at 0. Each row gets the same search of the policy's
rate; the rows with value pretraining have as many iterations more as the critic is alone in.

References: Yuan et al. 2025 (VC-PPO), https://arxiv.org/abs/2503.01491; Yue et al. 2025 (VAPO),
https://arxiv.org/abs/2504.05118.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from film_reviews import data

from ppo_jax.data.records import write_jsonl
from studies import config_of
from studies.methods import searched

ITERATIONS, ALONE = 24, 8  # of policy and critic; of the critic alone, before them
PRETRAINED = {"ppo.critic_warmup": ALONE, "ppo.num_iterations": ITERATIONS + ALONE}
ROWS = {
    "lambda 0.95": {},
    "decoupled: the critic's lambda 1": {"ppo.value_gae_lambda": 1.0},
    "decoupled, value pretraining": {"ppo.value_gae_lambda": 1.0} | PRETRAINED,
    "lambda 1 for both": {"ppo.gae_lambda": 1.0},
    "lambda by length, the critic's 1": {"ppo.gae_lambda_alpha": 0.05, "ppo.value_gae_lambda": 1.0},
}
RATES = (1e-3, 3e-3, 1e-2)
SENTENCES, TEXTS = 7, 1500  # of a text to imitate; how many


def get_config(variant: str = "tiny"):
    """configs/verifiable.py with long texts; the tiny variant is a smaller model."""
    config = config_of("verifiable", "acting")
    config.prepare = "studies.late_reward:prepare"
    config.model.scratch.max_length = 256
    config.sft.update(data="{workdir}/data/long.jsonl", max_length=256, batch_size=16)
    config.ppo.update(max_prompt_length=16, response_length=128, num_iterations=ITERATIONS)
    config.ppo.optimizer.schedule = "constant"  # the same at the same iteration of any row
    if variant == "tiny":
        config.model.scratch.update(embed_dim=64, mlp_dim=192)
        config.sft.num_epochs = 3.0
        config.ppo.update(rollout_batch_size=32, num_epochs=1, num_minibatches=4)
        config.ppo.update(sample_every=100, num_samples=2, save_every=100)
    return config


def sweep():
    return searched(ROWS, RATES)


def prepare(folder: Path):
    """The quickstart's files, and texts of several sentences drawn by chance."""
    data.prepare(folder)
    lines = (folder / "sft.jsonl").read_text().splitlines()
    sentences = [json.loads(line)["text"] for line in lines]
    draw = np.random.default_rng(0)
    drawn = (draw.choice(sentences, SENTENCES, replace=False) for _ in itertools.count())
    rows = [{"text": " ".join(some)} for some in itertools.islice(drawn, TEXTS)]
    write_jsonl(folder / "long.jsonl", rows)
