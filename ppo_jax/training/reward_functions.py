"""Reward functions of the user's own: found, called, their numbers checked.

Dimension key: N responses, T response tokens.
"""

import copy
import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.config.parsing import FunctionFailed, describe_error, failure, load_function
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.data.readers import short_repr

FIELD = "ppo.reward_function"
EXPECTED = "(prompts: list[str], responses: list[str]) -> one number a response"
TEXTS = ("prompts", "responses")
# Keywords that need no column: [N] bool, whether a stop token ended the response, and N lists of
# its tokens, the stop token included.
BUILT_IN = ("finished", "response_tokens")
METRICS = ("adjusted_score_mean", "episodes", "kl_penalty", "score_mean", "score_std")  # reward/...

OF_TEXT = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function with the name that it has in the config.

    It is given prompts and responses, and of columns of the data and `BUILT_IN` those that it names
    as parameters; all of them with `**others`. A parameter with a default may have no column, but
    not one that some rows lack.
    """

    name: str
    function: Callable[..., Any]
    seconds: float = math.inf  # that a call may take
    weight: float = 1.0  # of its numbers in the sum of several functions

    @functools.cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """Those of the function; none where it tells nothing of itself, as some in C."""
        try:
            return list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):
            return []

    @property
    def texts_by_name(self) -> bool:
        """Whether prompts and responses are parameters of these names, in any order."""
        return set(TEXTS) <= {p.name for p in self.parameters if p.kind in BY_NAME}

    @property
    def texts(self) -> list[str]:
        """The names of the parameters that are given prompts and responses, in this order."""
        if self.texts_by_name:
            return list(TEXTS)
        return [p.name for p in self.parameters if p.kind in OF_TEXT][: len(TEXTS)]

    @property
    def keywords(self) -> dict[str, bool]:
        """{keyword that it names beside the texts: whether it must be given}."""
        others = [p for p in self.parameters if p.kind in BY_NAME and p.name not in self.texts]
        return {p.name: p.default is p.empty for p in others}

    @property
    def takes_all(self) -> bool:
        return any(p.kind is p.VAR_KEYWORD for p in self.parameters)

    def columns(self, columns: Collection[str], gaps: Mapping[str, str], path: str) -> set[str]:
        """The columns that it is given.

        Args:
            columns: those that every row of the prompts has.
            gaps: column -> the first row without it, of those that only some rows have.
            path: of the prompts.

        Raises:
            ValueError: a keyword has no column, or one with gaps, or the name of a built-in.
        """
        texts = {*TEXTS, *self.texts}  # a column "prompt" may be the name of a parameter
        chosen = set(columns) - {*texts, *BUILT_IN} if self.takes_all else set()
        if not self.texts_by_name and (clash := {*self.texts[1:]} & {*columns, *gaps}):
            raise ValueError(
                f"{FIELD} {self.name} has {clash.pop()!r} in the place of the responses, which is "
                f"a column of {path}: its first two parameters must be {' and '.join(TEXTS)}"
            )
        for keyword, needed in self.keywords.items():
            if keyword in BUILT_IN:
                if keyword in columns or keyword in gaps:
                    raise ValueError(
                        f"{path}: the column {keyword!r}, which {FIELD} {self.name} asks for, must "
                        "have another name: every function can ask for that of the responses"
                    )
            elif keyword in gaps:
                raise ValueError(
                    f"{gaps[keyword]}: there is no {keyword!r}, which {FIELD} {self.name} asks for"
                )
            elif keyword in columns:
                chosen.add(keyword)
            elif needed:
                raise ValueError(
                    f"{FIELD} {self.name} asks for {keyword!r}, which {path} has not: its columns "
                    f"are {sorted([*columns, *gaps])}, and every function has {list(BUILT_IN)}"
                )
        return chosen

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], **others: Sequence
    ) -> np.ndarray | list[np.ndarray]:
        """The scores of N responses: [N] float64, or for each response [T] float64 of its tokens.

        The function is given copies: what it does to them is nobody else's.

        Args:
            prompts: N texts.
            responses: N texts.
            **others: N values for each column, and the built-in ones.

        Raises:
            FunctionFailed: the function raised something, or took too long.
            ValueError: it did not give one finite number, or one for each token, a response.
        """
        texts = [list(prompts), list(responses)]
        asked = {k: v for k, v in others.items() if self.takes_all or k in self.keywords}
        named = {k: v for k, v in asked.items() if k not in self.texts}
        named, args = copy.deepcopy(named), texts
        if self.texts_by_name:
            named, args = dict(zip(TEXTS, texts, strict=True)) | named, []
        count = len(responses)
        lengths = list(map(len, others["response_tokens"])) if "response_tokens" in others else None

        def call():
            return read_scores(self.function(*args, **named), count, lengths)

        try:
            return within(self.seconds, call)
        except TookTooLong:
            limit = f"ppo.reward_timeout_s={self.seconds:g} for {count} responses"
            raise FunctionFailed(f"{FIELD} {self.name} took more than {limit}") from None
        except BadScores as error:
            expected = f"{count} finite numbers, one a response"
            if error.of_tokens:
                expected = f"{count} lists of finite numbers, one a token"
            wrong = f"must return {expected}, got {error}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: it would end the run as if it were done
            raise failure(f"{FIELD} {self.name}", error) from error
        raise ValueError(f"{FIELD} {self.name} {wrong}")


class TookTooLong(Exception):
    """A call has not ended in its time."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises, if it does so in time.

    Raises:
        TookTooLong: it did not. Its thread goes on until the process ends.
    """
    if seconds == math.inf:
        return function()
    outcome: list[tuple[Any, BaseException | None]] = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:  # a thread would swallow SystemExit
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


def load_reward_functions(settings: PPOSettings) -> list[RewardFunction]:
    """The functions that the settings name, with their weights; none beside a reward model.

    Raises:
        ValueError: there is no such function, or it cannot be called with prompts and responses.
        FunctionFailed: its module raised something.
    """
    names = settings.reward_functions or (settings.reward_function,) * bool(
        settings.reward_function
    )
    weights = settings.reward_weights or (1.0,) * len(names)
    seconds = settings.reward_timeout_s
    return [
        load_reward_function(name, seconds, weight)
        for name, weight in zip(names, weights, strict=True)
    ]


def load_reward_function(
    name: str, seconds: float = math.inf, weight: float = 1.0
) -> RewardFunction:
    """The function that "module:function" names.

    Raises:
        ValueError, FunctionFailed: as `load_reward_functions`.
    """
    loaded = RewardFunction(name, load_function(name, FIELD), seconds, weight)
    if not loaded.parameters:
        return loaded
    signature = inspect.signature(loaded.function)
    others = {keyword: [] for keyword, needed in loaded.keywords.items() if needed}
    try:
        if loaded.texts_by_name:
            signature.bind(**dict.fromkeys(TEXTS, []), **others)
        else:
            signature.bind([], [], **others)
        misplaced = any(a != b and a in TEXTS for a, b in zip(loaded.texts, TEXTS, strict=False))
        if misplaced or {*TEXTS} & {*loaded.keywords}:
            raise TypeError("prompts and responses must be the first two, or both have these names")
    except TypeError as error:
        raise ValueError(
            f"{FIELD} must be a function {EXPECTED}, got {name} with {signature}: {error}"
        ) from error
    if inspect.iscoroutinefunction(loaded.function):
        raise ValueError(f"{FIELD} must be a plain function, got {name}, which is an async one")
    return loaded


def metric_names(names: Sequence[str]) -> list[str]:
    """The metric of each function, by its own name where that is no other's.

    >>> metric_names(["mine:right", "mine:short", "yours:short"])
    ['reward/right', 'reward/mine.short', 'reward/yours.short']
    """
    short = [name.partition(":")[2] for name in names]
    return [
        f"reward/{own if short.count(own) == 1 and own not in METRICS else name.replace(':', '.')}"
        for own, name in zip(short, names, strict=True)
    ]


# --- what a function gives ------------------------------------------------------------------------


class BadScores(ValueError):
    """What is wrong with the numbers that a function gave."""

    def __init__(self, message: str, of_tokens: bool = False):
        super().__init__(message)
        self.of_tokens = of_tokens


def read_scores(
    given: Any, count: int, lengths: Sequence[int] | None = None
) -> np.ndarray | list[np.ndarray]:
    """Numbers that a function gave: [count] float64, or `count` arrays of the given lengths.

    A function may give anything, so the value is read once, and only what numpy made of it is used.

    Args:
        given: what it gave.
        count: of responses or texts.
        lengths: tokens of each response; None allows one number a response alone.

    Raises:
        BadScores: it is none of that, or holds a number that is not finite in float32.

    >>> read_scores([0.5, True], 2).tolist()
    [0.5, 1.0]
    >>> [row.tolist() for row in read_scores([[0.5], [1, 2]], 2, lengths=[1, 2])]
    [[0.5], [1.0, 2.0]]
    >>> read_scores([0.5, float("nan")], 2)
    Traceback (most recent call last):
    ppo_jax.training.reward_functions.BadScores: nan for response 1
    """
    try:
        if np.ma.is_masked(given):
            raise BadScores(f"a masked array: {short_repr(given)}")
        if lengths is not None and _are_rows(given):
            return _token_scores(list(given), lengths)
        return _numbers(given, count, "response")
    except BadScores:
        raise
    except (TypeError, ValueError) as error:
        raise BadScores(short_repr(given)) from error
    except Exception as error:  # a tensor with a gradient, an integer beyond float, ...
        raise BadScores(f"{short_repr(given)} ({describe_error(error)})") from error


def _are_rows(given: Any) -> bool:
    """Whether it holds lists or arrays."""
    return (
        isinstance(given, list | tuple | np.ndarray)
        and any(isinstance(item, list | tuple) or getattr(item, "ndim", 0) for item in given)
        or getattr(given, "ndim", 1) == 2
    )


def _token_scores(rows: list, lengths: Sequence[int]) -> list[np.ndarray]:
    if len(rows) != len(lengths):
        raise BadScores(f"{len(rows)}: {short_repr(rows)}", of_tokens=True)
    scores = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        try:
            if np.ma.is_masked(row):
                raise BadScores(f"a masked array: {short_repr(row)}")
            scores.append(_numbers(row, length, "token"))
        except BadScores as error:
            of = f"for response {i}, which has {length} tokens"
            raise BadScores(f"{error} {of}", of_tokens=True) from error
    return scores


def _numbers(given: Any, count: int, unit: str) -> np.ndarray:
    array = np.asarray(given)
    # numpy reads numbers out of texts and times; here they are a slip.
    numeric = array.dtype.kind in "biuf" or array.dtype.kind == "O"
    if array.ndim != 1 or not numeric or any(isinstance(x, str | bytes) for x in array):
        raise BadScores(short_repr(given))
    if len(array) != count:
        raise BadScores(f"{len(array)}: {short_repr(given)}")
    numbers = array.astype(np.float64)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
    if bad.size:
        raise BadScores(f"{array[bad[0]]} for {unit} {bad[0]}")
    return numbers
