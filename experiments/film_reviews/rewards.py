"""A verifiable reward: does a response speak of the acting?"""

import re

ACTING = re.compile(r"\b(acting|actors?|actress|performances?|cast)\b", re.IGNORECASE)


def mentions_acting(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response that speaks of the acting, else 0: the reward of configs/verifiable.py."""
    del prompts
    return [float(bool(ACTING.search(response))) for response in responses]
