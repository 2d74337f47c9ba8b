"""Random texts, the same for peers and ours; by numpy alone, which a peer's environment has."""

import math

import numpy as np

SHORTEST = 4  # tokens
SPREAD = 0.7  # of the logarithm, as that of the paragraphs of many texts
FIRST_TOKEN = 2  # those below are padding and EOS


def parse_lengths(kind: str, longest: int) -> tuple[str, int]:
    """("fixed", `longest`), ("geometric", mean) or ("lognormal", median).

    Raises:
        ValueError: the kind is another, or its number does not fit.
    """
    name, _, number = kind.partition(":")
    if kind == "fixed":
        return name, longest
    if name not in ("geometric", "lognormal") or not number.isdecimal():
        raise ValueError(
            f"--lengths must be fixed, geometric:MEAN or lognormal:MEDIAN, got {kind!r}"
        )
    if not SHORTEST < int(number) < longest:
        raise ValueError(
            f"--lengths={kind} must have a number above {SHORTEST} and below the longest text's, "
            f"{longest}"
        )
    return name, int(number)


def draw_lengths(kind: str, count: int, longest: int, seed: int = 0) -> np.ndarray:
    """[count] int: tokens of each text, from `SHORTEST` to `longest`."""
    name, number = parse_lengths(kind, longest)
    random = np.random.default_rng(seed)
    if name == "fixed":
        return np.full(count, longest)
    if name == "geometric":
        lengths = SHORTEST - 1 + random.geometric(1 / (number - SHORTEST + 1), size=count)
    else:
        lengths = random.lognormal(math.log(number), SPREAD, size=count).astype(int)
    return lengths.clip(SHORTEST, longest)


def draw_texts(
    kind: str, count: int, longest: int, vocab_size: int, seed: int = 0
) -> list[np.ndarray]:
    """The tokens of each text, [its length] int32."""
    lengths = draw_lengths(kind, count, longest, seed)
    random = np.random.default_rng(seed + 1)
    return [
        random.integers(FIRST_TOKEN, vocab_size, size=length, dtype=np.int32) for length in lengths
    ]
