"""Rotary positions: the frequencies of each kind of scaling, and the rotation.

Every kind is a value with `frequencies`, equal to those that transformers computes.

Dimension key: B sequences, L positions, H heads, K head size, r rotated numbers of a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def plain_frequencies(theta: float, size: int) -> list[float]:
    """Radians per position of each rotated pair, [r / 2]: theta^(-2 i / r).

    Reference: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.2.
    """
    return [theta ** (-i / size) for i in range(0, size, 2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """What kinds of scaling share: `attention_factor`, by which cosines and sines are multiplied.

    Each has `frequencies(theta, size, length)`: radians per position of each rotated pair, [r / 2],
    in rows of `length` positions.
    """

    attention_factor: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, bool) and not 0 < number < math.inf:
                    raise ValueError(f"model.rope_scaling.{field.name} must be > 0, got {value!r}")

    def for_rows(self, length: int) -> "Scaling":
        """The scaling of rows of up to `length` positions, whatever they are padded to."""
        return self

    @property
    def kind(self) -> str:
        """As a config.json calls it, `rope_type`."""
        return next(name for name, scaling in SCALINGS.items() if type(self) is scaling)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Scaling):
    """The frequency scaling of Llama 3: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def __post_init__(self):
        super().__post_init__()
        if self.low_freq_factor == self.high_freq_factor:
            raise ValueError(
                "model.rope_scaling.high_freq_factor must differ from low_freq_factor, got "
                f"{self.high_freq_factor!r} for both"
            )

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        def scaled(frequency):
            rotations = self.original_max_length * frequency / (2 * math.pi)
            ramp = rotations - self.low_freq_factor
            keep = min(max(ramp / (self.high_freq_factor - self.low_freq_factor), 0.0), 1.0)
            return keep * frequency + (1 - keep) * frequency / self.factor

        return [scaled(frequency) for frequency in plain_frequencies(theta, size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Positions are divided by `factor`.

    Reference: Chen et al. 2023, https://arxiv.org/abs/2306.15595.
    """

    factor: float

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        return [frequency / self.factor for frequency in plain_frequencies(theta, size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """The base grows with rows longer than `original_max_length`; others are as without."""

    factor: float
    original_max_length: int

    def for_rows(self, length: int) -> Scaling:
        if length > self.original_max_length:
            return DynamicRows(**vars(self), length=length)
        return LinearScaling(factor=1.0, attention_factor=self.attention_factor)

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        longer = max(1.0, length / self.original_max_length)
        growth = self.factor * longer - (self.factor - 1)
        return plain_frequencies(theta * growth ** (size / max(size - 2, 1)), size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRows(DynamicScaling):
    """Dynamic scaling by the given length, whatever the width of rows is."""

    length: int

    def for_rows(self, length: int) -> Scaling:
        return self

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        return super().frequencies(theta, size, self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """Pairs that rotate fewer than `beta_slow` times over `original_max_length` are stretched by
    `factor`, those of more than `beta_fast` are left, and those between are a mixture.

    Reference: Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the borders are whole pairs

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        def border(rotations):
            turns = self.original_max_length / (rotations * 2 * math.pi)
            return size * math.log(turns) / (2 * math.log(theta))

        low, high = border(self.beta_fast), border(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        width = high - low if high != low else 0.001

        def scaled(i, frequency):
            stretched = min(max((i - low) / width, 0.0), 1.0)
            return stretched * frequency / self.factor + (1 - stretched) * frequency

        return [scaled(i, x) for i, x in enumerate(plain_frequencies(theta, size))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Scaling):
    """Each pair has a factor of its own: one of `long_factor` in rows longer than
    `original_max_length`, else of `short_factor`.

    Whether a row is long its width says, padding included, unless it is decided for all rows, see
    `ModelConfig.for_rows`.

    Reference: Ding et al. 2024, https://arxiv.org/abs/2402.13753.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_length: int

    def for_rows(self, length: int) -> Scaling:
        factors = self.factors(length)
        return dataclasses.replace(self, short_factor=factors, long_factor=factors)

    def factors(self, length: int) -> tuple[float, ...]:
        return self.long_factor if length > self.original_max_length else self.short_factor

    def frequencies(self, theta: float, size: int, length: int) -> list[float]:
        factors = self.factors(length)
        plain = plain_frequencies(theta, size)
        return [x / factor for x, factor in zip(plain, factors, strict=True)]


SCALINGS: dict[str, type[Scaling]] = {
    "llama3": RopeScaling,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}


def rotary_angles(
    positions_BL: jax.Array, theta: float, size: int, scaling: Scaling | None, length: int
) -> jax.Array:
    """[B, L, 2, r / 2] float32: cosine and sine of each of the rotated pairs of a head.

    The barrier keeps XLA from computing them again for each head of each layer, inside of what
    reads them: a CPU then spends ten times as long on a rotation.
    """
    if scaling is None:
        frequencies, factor = plain_frequencies(theta, size), 1.0
    else:
        frequencies = scaling.frequencies(theta, size, length)
        factor = scaling.attention_factor
    angles = positions_BL[:, :, None] * jnp.asarray(frequencies, jnp.float32)[None, None, :]
    both = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2)
    return jax.lax.optimization_barrier(both if factor == 1 else both * factor)


def rotate(x_BLHK: jax.Array, angles_BL2K: jax.Array) -> jax.Array:
    """Rotary position embedding by `rotary_angles`, in the half-split layout of Hugging Face; what
    is behind the rotated numbers of a head stays as it is."""
    size = 2 * angles_BL2K.shape[-1]
    cos, sin = angles_BL2K[:, :, None, 0], angles_BL2K[:, :, None, 1]
    a, b = jnp.split(x_BLHK[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    rest = [x_BLHK[..., size:].astype(jnp.float32)] if size < x_BLHK.shape[-1] else []
    return jnp.concatenate([*rotated, *rest], axis=-1).astype(x_BLHK.dtype)
