"""Hidden states of texts that one stage of a run computes and a later one reads.

SFT and reward training often have texts in common, and frozen layers: the states of a text after
layer K depend on its tokens and on the layers below K alone. They are kept in a file, so that a
stage that is taken up again reads what it has read before, bit for bit.
Dimension key: L tokens of a text, D model.
"""

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.core.types import Params
from ppo_jax.data.atomic import atomic_write
from ppo_jax.data.encode import TokenizedTexts
from ppo_jax.models.config import ModelConfig

FOLDER = "hidden_states"  # of a run, until its reward model is trained


class SharedStates:
    """States after the lowest layers of a model, {the bytes of a text's tokens: [L, D]}."""

    def __init__(self, folder: Path, name: str, layer: int):
        """`folder` is where the file is, `name` that of the layers, `layer` how many they are."""
        self.path, self.layer = folder / f"{name}.npz", layer
        self._states: dict[bytes, np.ndarray] = {}

    def keep(self, texts: TokenizedTexts, row: int, states: np.ndarray):
        """Keep the states [L, D] of a row, which may be of several texts."""
        for tokens, where in texts_of_row(texts, row):
            self._states[tokens.tobytes()] = np.ascontiguousarray(states[where])

    def of(self, texts: TokenizedTexts, rows: np.ndarray) -> dict[int, np.ndarray]:
        """{row: states [L, D]} of those rows whose texts are all known."""
        found = {}
        for row in rows.tolist():
            parts = [self._states.get(tokens.tobytes()) for tokens, _ in texts_of_row(texts, row)]
            if all(part is not None for part in parts):
                found[row] = np.concatenate(parts)
        return found

    def save(self):
        """Write the file, or replace it; nothing where no states are kept."""
        if not self._states:
            return
        every = list(self._states.values())
        arrays = dict(
            tokens=np.frombuffer(b"".join(self._states), np.int32),
            lengths=np.array([len(states) for states in every]),
            states=np.concatenate(every).view(np.uint8),  # numpy has no bfloat16 of its own
            dtype=np.array(every[0].dtype.name),
        )
        file = io.BytesIO()
        np.savez(file, **arrays)
        self.path.parent.mkdir(exist_ok=True)
        atomic_write(self.path, file.getbuffer())

    def load(self) -> "SharedStates | None":
        """The same with what the file holds; None where there is none."""
        if not self.path.is_file():
            return None
        with np.load(self.path) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            tokens = np.split(file["tokens"], ends)
            states = np.split(file["states"].view(jnp.dtype(str(file["dtype"]))), ends)
        keys = (x.tobytes() for x in tokens)
        self._states.update(zip(keys, states, strict=True))
        return self


def texts_of_row(texts: TokenizedTexts, row: int) -> Iterator[tuple[np.ndarray, slice]]:
    """(the tokens of a text, its place in the row) of each text that a row holds."""
    tokens = texts.tokens[row][texts.mask[row]]
    ends = [len(tokens)]
    if texts.segment_ids is not None:
        numbers = texts.segment_ids[row][texts.mask[row]]
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
    for begin, end in zip([0, *ends], ends, strict=False):
        yield tokens[begin:end], slice(begin, end)


def layers_name(config: ModelConfig, params: Params, count: int) -> str:
    """A name of the embeddings and the lowest `count` layers: equal ones have the same.

    Args:
        config: the model's shape.
        params: have these layers one by one, not stacked, and maybe more.
        count: 1 or more.
    """
    shape = dataclasses.replace(config, num_layers=count)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    parts = [params["embed"], *(params["layers"][str(i)] for i in range(count))]
    for leaf in jax.tree.leaves(parts):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
