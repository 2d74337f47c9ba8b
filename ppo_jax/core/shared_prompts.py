"""Joined rows: a prompt stands once, and several responses to it follow.

Each response has the positions, and attends to the prompt and itself alone, as in a row apart. So
it has the same outputs, and what a prompt costs it costs once.

Dimension key: N responses, n of them to each of G prompts, P prompt positions, S positions of a
response, L = P + S of a row apart, W = P + n S of a joined one, T positions that are read.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SharedPrompt:
    """The shape of joined rows.

    >>> shared, apart = SharedPrompt(2, 3), jnp.array([[1, 2, 3], [1, 2, 4], [1, 2, 5]])
    >>> shared.join(apart).tolist(), shared.split(shared.join(apart)).tolist()
    ([[1, 2, 3, 4, 5]], [[1, 2, 3], [1, 2, 4], [1, 2, 5]])
    """

    length: int  # P
    samples: int  # n

    def response_length(self, width: int) -> int:
        """S of joined rows of W positions."""
        return (width - self.length) // self.samples

    def join(self, x: jax.Array) -> jax.Array:
        """[N, L, ...] of rows apart -> [G, W, ...]; a prompt is that of its first response."""
        prompts, responses = x[:: self.samples, : self.length], x[:, self.length :]
        responses = responses.reshape(len(prompts), -1, *x.shape[2:])
        return jnp.concatenate([prompts, responses], axis=1)

    def split(self, x: jax.Array, first: int = 0) -> jax.Array:
        """[G, W, ...] -> [N, L - first, ...], the positions of rows apart from `first` on."""
        count, length = x.shape[0], self.response_length(x.shape[1])
        rest = x.shape[2:]
        prompts = x[:, None, first : self.length]
        prompts = jnp.broadcast_to(prompts, (count, self.samples, *prompts.shape[2:]))
        responses = x[:, self.length :].reshape(count, self.samples, length, *rest)
        responses = responses[:, :, max(first - self.length, 0) :]
        both = jnp.concatenate([prompts, responses], axis=2)
        return both.reshape(count * self.samples, -1, *rest)

    def take(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """[G, W, ...], and positions [N, T] of rows apart -> [N, T, ...]."""
        number = jnp.arange(len(positions), dtype=positions.dtype)[:, None] % self.samples
        begin = number * self.response_length(x.shape[1])
        index = jnp.where(positions < self.length, positions, positions + begin)
        index = index.reshape(x.shape[0], -1, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1).reshape(*positions.shape, *x.shape[2:])
