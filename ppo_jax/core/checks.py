"""Checks of the numbers among the arguments: each is one number and, where it is known, in range.

An array where one number is meant would broadcast without a word. Values are known outside of a
traced program alone; inside of one the functions clamp, as their docstrings say.
"""

import math

import chex
import jax
import numpy as np

Number = jax.Array | float


def assert_numbers(
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    **numbers: Number | None,
) -> None:
    """Each is a Python number or an array of rank 0; None is left out.

    Args:
        at_least: the lowest value allowed.
        above: a value that all must be above; -inf is none.
        at_most: the highest value allowed.
        **numbers: the arguments by their names.

    Raises:
        AssertionError: an array of another rank.
        ValueError: a value that is known (not traced) is NaN or outside of the range.

    >>> assert_numbers(at_least=0, at_most=1, top_p=1.5)
    Traceback (most recent call last):
    ...
    ValueError: top_p must be at least 0 and at most 1, got 1.5
    """
    for name, x in numbers.items():
        if x is None:
            continue
        chex.assert_rank(x, 0, custom_message=f"{name} is one number; for several use jax.vmap")
        given = known(x)
        if given is None:
            continue
        value = float(given)
        in_range = at_least <= value <= at_most and (value > above or above == -math.inf)
        if math.isnan(value) or not in_range:
            rules = (
                (f"at least {at_least:g}", at_least > -math.inf),
                (f"above {above:g}", above > -math.inf),
                (f"at most {at_most:g}", at_most < math.inf),
            )
            rule = " and ".join(words for words, given in rules if given) or "a number"
            raise ValueError(f"{name} must be {rule}, got {value:g}")


def assert_counts(*, at_least: int = 1, **counts: int) -> None:
    """Each is a whole number that shapes the program, and at least `at_least`.

    Raises:
        ValueError: one is not.

    >>> assert_counts(num_epochs=0)
    Traceback (most recent call last):
    ...
    ValueError: num_epochs must be at least 1 and whole, got 0
    """
    for name, count in counts.items():
        whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if not whole or count < at_least:
            raise ValueError(f"{name} must be at least {at_least} and whole, got {count!r}")


def assert_divides(total: int, what: str, **parts: int) -> None:
    """The product of some counts divides a total.

    Args:
        total: what is divided.
        what: its name in the message.
        **parts: the counts by their names, each at least 1.

    Raises:
        ValueError: it does not.

    >>> assert_divides(10, "responses", num_minibatches=4, num_micro_batches=1)
    Traceback (most recent call last):
    ...
    ValueError: num_minibatches x num_micro_batches (4 x 1) must divide the 10 responses
    """
    assert_counts(**parts)
    if total % math.prod(parts.values()):
        names, values = " x ".join(parts), " x ".join(map(str, parts.values()))
        raise ValueError(f"{names} ({values}) must divide the {total} {what}")


def assert_ids(tokens: jax.Array, mask: jax.Array, vocab_size: int) -> None:
    """Tokens where mask is True are ids of the vocabulary, where their values are known.

    Inside of a traced program nothing can be refused: there, an id that is too large reads the last
    row of the token table.

    Args:
        tokens: [B, L] int.
        mask: [B, L] bool; what the others hold is not looked at.
        vocab_size: V, ids are in [0, V).

    Raises:
        ValueError: an id is outside of the vocabulary.
    """
    ids, real = known(tokens), known(mask)
    if ids is None or real is None:
        return
    wrong = np.argwhere(real & ((ids < 0) | (ids >= vocab_size)))
    if wrong.size:
        row, position = wrong[0]
        raise ValueError(
            f"token ids must be in [0, {vocab_size}), got {ids[row, position]} in row {row} at "
            f"position {position}"
        )


def known(x: Number) -> np.ndarray | None:
    """The value of a number or an array; None for one that is traced, which has none yet, or of
    which this process holds a part alone.

    In numpy: inside of a program that is being made every operation of jax is traced, even that of
    a known array.
    """
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(jax.device_get(x))
