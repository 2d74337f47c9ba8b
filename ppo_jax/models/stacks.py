"""Loops over stacked layers of several kinds, each of which is compiled as what it is.

A stack whose kinds repeat, five with a window and one without for instance, is a loop over these
periods, and in each a loop over every run of layers of one kind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def period_of(kinds: Sequence[int]) -> int:
    """After how many layers the kinds repeat; the last time may be cut short.

    >>> period_of([0, 0, 1, 0, 0, 1, 0]), period_of([0, 1, 2, 0, 0]), period_of([0, 0])
    (3, 4, 1)
    """
    lengths = range(1, len(kinds) + 1)
    return next(p for p in lengths if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))


def runs(kinds: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of layers of one kind that follow one another.

    >>> runs([0, 0, 1, 0])
    [(0, 2), (2, 3), (3, 4)]
    """
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return list(zip(starts, [*starts[1:], len(kinds)], strict=True))


def scan_kinds(
    step: Callable[..., tuple[Any, Any]], carry: Any, xs: Any, kinds: Sequence[int]
) -> tuple[Any, Any]:
    """`jax.lax.scan` over layers, whose kinds are numbers of the program and no arrays.

    Args:
        step: (carry, the layer's part of `xs`, its kind, whether it stands alone) -> (carry,
            result). Alone is what is in no loop.
        carry: of the first layer.
        xs: arrays [layers, ...].
        kinds: of each layer.

    Returns:
        (carry, the results [layers, ...])
    """

    def in_order(carry, xs, kinds, in_loop):
        results = []
        for begin, end in runs(kinds):
            alone = not in_loop and end == begin + 1

            def same(carry, x, kind=kinds[begin], alone=alone):
                return step(carry, x, kind, alone)

            carry, result = jax.lax.scan(same, carry, part(xs, begin, end))
            results.append(result)
        return carry, joined(results)

    period = period_of(kinds)
    times = len(kinds) // period
    if times == 1:
        return in_order(carry, xs, kinds, False)
    whole = times * period

    def one_period(carry, xs):
        return in_order(carry, xs, kinds[:period], True)

    grouped = jax.tree.map(lambda x: x.reshape(times, period, *x.shape[1:]), part(xs, 0, whole))
    carry, results = jax.lax.scan(one_period, carry, grouped)
    results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
    if whole == len(kinds):
        return carry, results
    carry, rest = in_order(carry, part(xs, whole, len(kinds)), kinds[whole:], False)
    return carry, joined([results, rest])


def part(xs: Any, begin: int, end: int) -> Any:
    """Some of the layers of [layers, ...]."""
    return jax.tree.map(lambda x: x if len(x) == end - begin else x[begin:end], xs)


def joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
