"""What PPO is evaluated with while it trains: prompts and judges of the `evaluate` section."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config.run import Config
from ppo_jax.data.encode import take_prompts
from ppo_jax.data.prompts import PromptData, prompt_data
from ppo_jax.distributed.processes import on_primary
from ppo_jax.evaluation.judges import JudgePanel, make_panel
from ppo_jax.evaluation.statistics import ask_judge
from ppo_jax.training.ppo import used_columns
from ppo_jax.training.ppo_evaluation import Rate
from ppo_jax.training.reward_functions import load_reward_functions

GOLD = "gold"  # the headline judge's name in metrics


def make_judging(config: Config, workdir: Path, tokenizer: Any) -> tuple[PromptData, Rate]:
    """(the prompts, what asks the judges); every process makes the panel together, and process 0
    alone asks it."""
    panel = make_panel(config.evaluate.judges, workdir)

    def rate(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        return on_primary(ask_judges, panel, list(texts))

    return training_prompts(config, tokenizer), rate


def ask_judges(panel: JudgePanel, texts: list[str]) -> dict[str, np.ndarray]:
    """The scores [N] of N texts by each judge, under names that metrics may have.

    >>> panel = JudgePanel(judges={"two experts": lambda texts: [float(len(x)) for x in texts]})
    >>> ask_judges(panel, ["a", "bc"])
    {'gold': array([1., 2.])}
    """
    scores = {}
    for name, judge in panel.judges.items():
        if name != panel.headline_judge:
            scores[re.sub(r"\W+", "_", name)] = ask_judge(name, judge, texts)
    headline = panel.headline_judge
    return scores | {GOLD: ask_judge(headline, panel.judges[headline], texts)}


def training_prompts(config: Config, tokenizer: Any) -> PromptData:
    """The last `ppo.evaluate_prompts` of the prompts: the verdict is of the first ones, so that a
    checkpoint that was chosen by some is judged on others, as far as there are enough.

    Raises:
        ValueError: there are fewer, or a reward function asks for a column that they lack.
    """
    ppo, path = config.ppo, config.evaluate.prompts
    functions = load_reward_functions(ppo)
    field = "evaluate.prompts"
    how = dict(max_length=ppo.max_prompt_length, field=field, columns=bool(functions))
    data = used_columns(prompt_data(path, tokenizer, **how), functions, path)
    count = len(data.texts)
    if count < ppo.evaluate_prompts:
        raise ValueError(
            f"ppo.evaluate_prompts must be at most the {count} prompts of {path}, got "
            f"{ppo.evaluate_prompts}"
        )
    rows = np.arange(count - ppo.evaluate_prompts, count)
    return dataclasses.replace(
        data,
        texts=[data.texts[i] for i in rows],
        prompts=take_prompts(data.prompts, rows),
        columns={name: [values[i] for i in rows] for name, values in data.columns.items()},
    )
