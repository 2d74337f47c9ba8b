"""A user's own reward function: found, its parameters checked, called, its numbers checked."""

import dataclasses
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_jax.config.parsing import load_function
from ppo_jax.data.readers import short_repr

FIELD = "ppo.reward_function"
EXPECTED = "(prompts: list[str], responses: list[str]) -> one number a response"


class FunctionFailed(RuntimeError):
    """A function of the user's took too long, or raised an error: the cause of this one."""


def failure(function: str, error: Exception) -> FunctionFailed:
    """What to raise from an error inside of a function of the user's."""
    return FunctionFailed(f"{function} raised {type(error).__name__}: {error}".rstrip(": "))


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function with the name that it has in the config."""

    name: str
    function: Callable[[list[str], list[str]], Sequence[float]]
    seconds: float = math.inf  # that a call may take

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """The scores of N responses, [N] float32.

        Raises:
            FunctionFailed: the function raised something, or took too long.
            ValueError: it did not give one finite number a response.
        """
        try:
            given = within(self.seconds, self.function, prompts, responses)
        except TookTooLong:
            limit = f"ppo.reward_timeout_s={self.seconds:g} for {len(responses)} responses"
            raise FunctionFailed(f"{FIELD} {self.name} took more than {limit}") from None
        except Exception as error:
            raise failure(f"{FIELD} {self.name}", error) from error
        if wrong := reject_reason(given, len(responses)):
            raise ValueError(
                f"{FIELD} {self.name} must return {len(responses)} finite numbers, one a response, "
                f"got {wrong}"
            )
        return np.asarray(given, np.float32)


class TookTooLong(Exception):
    """A call has not ended in its time."""


def within(seconds: float, function: Callable, *args: Any) -> Any:
    """What a function returns or raises, if it does so in time.

    Raises:
        TookTooLong: it did not. Its thread goes on until the process ends.
    """
    if seconds == math.inf:
        return function(*args)
    outcome: list[tuple[Any, Exception | None]] = []

    def call():
        try:
            outcome.append((function(*args), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TookTooLong
    returned, error = outcome[0]
    if error is not None:
        raise error
    return returned


def load_reward_function(name: str, seconds: float = math.inf) -> RewardFunction:
    """The function that "module:function" names.

    Raises:
        ValueError: there is none, or it cannot be called with prompts and responses.
    """
    function = load_function(name, FIELD)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C tell nothing of themselves
        return RewardFunction(name, function, seconds)
    try:
        signature.bind("prompts", "responses")
    except TypeError as error:
        raise ValueError(
            f"{FIELD} must be a function {EXPECTED}, got {name} with {signature}: {error}"
        ) from error
    return RewardFunction(name, function, seconds)


def reject_reason(given: Any, count: int) -> str:
    """What is wrong with scores that a function gave, or "".

    >>> reject_reason([0.5, 1], 2)
    ''
    >>> reject_reason([0.5, float("nan")], 2)
    'nan for response 1'
    >>> reject_reason([0.5], 2)
    '1: [0.5]'
    >>> reject_reason(["0.5", "1"], 2)
    "['0.5', '1']"
    """
    try:
        # numpy reads numbers out of texts; here a text is a slip.
        texts = np.asarray(given).dtype.kind in "SU"
        with np.errstate(over="ignore"):
            scores = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        return short_repr(given)
    if texts or scores.ndim != 1:
        return short_repr(given)
    if len(scores) != count:
        return f"{len(scores)}: {short_repr(given)}"
    bad = np.flatnonzero(~np.isfinite(scores))
    return f"{given[bad[0]]} for response {bad[0]}" if bad.size else ""
