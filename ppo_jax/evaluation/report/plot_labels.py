"""Where a label can stand in a picture without covering what is drawn there."""

from collections.abc import Sequence

import numpy as np


def clear_place(
    near: Sequence[float],
    size: Sequence[float],
    things: np.ndarray,
    within: Sequence[float],
) -> tuple[float, float]:
    """The place for a box that is the nearest to a point and covers nothing.

    All lengths are in pixels, and so is the grid of the places that are tried.

    Args:
        near: (x, y) of the point.
        size: (width, height) of the box.
        things: [N, 2] what it must not cover; lines as points a pixel apart, see `along`.
        within: (left, bottom, right, top) of the area that it must lie in; larger than the box.

    Returns:
        (x, y) of its lower left corner; where every place covers something, of that which covers
        the least.

    >>> clear_place((5.0, 5.0), (4.0, 2.0), np.array([[5.0, 5.0]]), (0.0, 0.0, 20.0, 20.0))
    (3.0, 3.0)
    """
    left, bottom, right, top = within
    columns, rows = int(right - left), int(top - bottom)
    width, height = (int(np.ceil(length)) for length in size)
    count, _, _ = np.histogram2d(
        *things.T, bins=(columns, rows), range=((left, left + columns), (bottom, bottom + rows))
    )
    sums = np.pad(count.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # over all pixels below, to the left
    high, low = sums[:, height:], sums[:, :-height]
    covered = high[width:] - high[:-width] - low[width:] + low[:-width]
    x = left + np.arange(covered.shape[0])[:, None]
    y = bottom + np.arange(covered.shape[1])[None, :]
    beside = np.maximum(np.maximum(x - near[0], near[0] - x - width), 0)
    above = np.maximum(np.maximum(y - near[1], near[1] - y - height), 0)
    # Of places as near, that in the middle above or below.
    middle = np.hypot(x + width / 2 - near[0], y + height / 2 - near[1])
    distance = np.hypot(beside, above) + 0.01 * middle
    distance[covered > covered.min()] = np.inf
    column, row = np.unravel_index(distance.argmin(), distance.shape)
    return float(left + column), float(bottom + row)


def along(line: np.ndarray) -> np.ndarray:
    """Points at most a pixel apart on a line through points [N, 2], from its first to its last.

    >>> along(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]])).tolist()
    [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 1.0]]
    """
    steps = np.hypot(*np.diff(line, axis=0).T)
    length = np.concatenate([[0.0], steps.cumsum()])
    at = np.linspace(0.0, length[-1], int(np.ceil(length[-1])) + 1)
    return np.stack([np.interp(at, length, line[:, axis]) for axis in (0, 1)], axis=1)


def filled(corner: Sequence[float], size: Sequence[float]) -> np.ndarray:
    """The pixels [N, 2] of a box from its lower left corner.

    >>> filled((1.0, 2.0), (2.0, 1.0)).tolist()
    [[1.0, 2.0], [2.0, 2.0]]
    """
    x, y = (begin + np.arange(np.ceil(length)) for begin, length in zip(corner, size, strict=True))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
