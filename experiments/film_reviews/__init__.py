"""The quickstart's task: film reviews that please, with real human ratings.

10,603 sentences from film reviews, each rated by 15 to 29 people from -4 to 4 (Hutto & Gilbert,
ICWSM 2014). The policy is given the first words of a sentence and completes it; the reward model
learns from comparisons of single human ratings. It is the sentiment task of Ziegler et al. 2019.

The sentences fall into four parts by their text: `train` for fine-tuning, the reward model and
PPO's prompts; `judge` for the judges alone; `validation` for unseen pairs and prompts to choose
settings by; `test` for the figures of the chosen ones.
"""

import importlib

from film_reviews.data import prepare
from film_reviews.rewards import mentions_acting

__all__ = ["judges", "mentions_acting", "prepare", "textblob", "vader"]
__all__ += ["word_judges", "words_as_gold"]


def __getattr__(name: str):
    """The judges are loaded when they are asked for: they need the extra `quickstart`."""
    if name not in __all__:
        raise AttributeError(f"module 'film_reviews' has no attribute {name!r}")
    return getattr(importlib.import_module("film_reviews.panels"), name)
