"""Functions of the user's choice, called with those of some named values that they ask for.

The names of its parameters say what a function needs: an estimator of advantages with a parameter
`values` needs a critic, one with `group_size` several responses to a prompt.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# What is offered to an estimator of advantages and to a loss of the policy, beside the numbers of
# `Hyperparameters`. See `estimate_advantages` and `experience_loss`.
ADVANTAGE_INPUTS = ("rewards", "values", "mask", "scores", "group_size")
ADVANTAGE_INPUTS += ("baseline", "greedy_scores")
LOSS_INPUTS = ("logprobs", "old_logprobs", "advantages", "mask", "weights", "segment_ids")
LOSS_INPUTS += ("normalizer", "behavior_logprobs", "dropped_mask", "penalty_mask")


def parameters(function: Callable) -> Mapping[str, bool]:
    """{name of a parameter: whether it must be given}, without those that `*` or `**` collect or
    that a `functools.partial` has bound.

    >>> parameters(lambda scores, *, group_size=2: None)
    {'scores': True, 'group_size': False}
    """
    of_names = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(function).parameters
    inner = inspect.unwrap(function)
    bound = inner.keywords if isinstance(inner, functools.partial) else {}
    free = {k: p for k, p in signature.items() if p.kind in of_names and k not in bound}
    return {name: p.default is p.empty for name, p in free.items()}


def reads_values(advantage: Callable) -> bool:
    """Whether an estimator of advantages needs a critic: it has a parameter `values`.

    >>> reads_values(lambda values, mask: values), reads_values(lambda scores: scores)
    (True, False)
    """
    return "values" in parameters(advantage)


def reads_greedy(advantage: Callable) -> bool:
    """Whether an estimator needs a greedy response to each prompt: it has a parameter
    `greedy_scores`.

    >>> reads_greedy(lambda scores, greedy_scores: scores - greedy_scores)
    True
    """
    return "greedy_scores" in parameters(advantage)


def is_of_sequences(loss: Callable) -> bool:
    """Whether a loss of the policy is one of whole responses: it has a parameter `segment_ids`.

    >>> is_of_sequences(lambda logprobs, segment_ids: logprobs)
    True
    """
    return "segment_ids" in parameters(loss)


def reads_behavior(loss: Callable) -> bool:
    """Whether a loss of the policy tells the policy that sampled from the one that its ratio starts
    from: it has a parameter `behavior_logprobs`.

    >>> reads_behavior(lambda logprobs, behavior_logprobs: logprobs)
    True
    """
    return "behavior_logprobs" in parameters(loss)


def unknown_parameters(function: Callable, names: Any) -> list[str]:
    """The parameters that must be given and are none of some names."""
    return [name for name, needed in parameters(function).items() if needed and name not in names]


def call_named(function: Callable, offered: Mapping[str, Any]) -> Any:
    """function(name=value, ...) with the values that it has a parameter for.

    Raises:
        ValueError: a parameter that must be given is none of those that are offered.

    >>> call_named(lambda a, *, c=1: a + c, {"a": 1, "b": 2})
    2
    """
    if unknown := unknown_parameters(function, offered):
        raise ValueError(
            f"{function_name(function)} asks for {', '.join(unknown)}; "
            f"there is {', '.join(sorted(offered))}"
        )
    return function(**{name: offered[name] for name in parameters(function) if name in offered})


def fields_named(cls: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(cls))


def fields_of(struct: Any) -> dict[str, Any]:
    """The fields of a dataclass by their names."""
    return {field.name: getattr(struct, field.name) for field in dataclasses.fields(struct)}


def function_name(function: Callable) -> str:
    """What a function is called in a message.

    >>> function_name(functools.partial(len))
    'len'
    """
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return getattr(function, "__name__", repr(function))
