"""What ends a response: stop tokens, and stop strings of several tokens.

Dimension key: V vocabulary, S states and K classes of tokens, see `StopStrings`.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_jax.io.tokenizers import declared_stops
from ppo_jax.rollout.sampling import StopStrings

MAX_BYTES = 512  # of all stop strings together, which bounds the table
CHUNK = 4096  # tokens whose transitions are computed at a time


def stop_ids(tokenizer: Any, stops: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's EOS, those that its model declares, and `stops`.

    Of `stops` those that are spelled as a token of the vocabulary count; see `stop_strings` for
    the others.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = [*declared_stops(tokenizer), *(stop for stop in stops if stop in vocabulary)]
    return tuple(sorted({tokenizer.eos_token_id} | {vocabulary[token] for token in tokens}))


def stop_strings(tokenizer: Any, stops: Sequence[str]) -> StopStrings | None:
    """Those of `stops` that are no token: a response ends with the token that completes one of
    them, in its middle or at its end. None where there are none.

    Raises:
        ValueError: the tokenizer writes a text otherwise, or they are too long.
    """
    vocabulary = tokenizer.get_vocab()
    texts = tuple(stop for stop in stops if stop not in vocabulary)
    return automaton(tokenizer, texts) if texts else None


@functools.lru_cache(maxsize=4)  # of a large vocabulary it takes seconds
def automaton(tokenizer: Any, texts: tuple[str, ...]) -> StopStrings:
    """The `StopStrings` of texts, if the tokenizer writes them as they are."""
    written = token_bytes(tokenizer)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = b"".join(written[i] for i in ids)
        if not text or text.encode() not in found:
            raise ValueError(
                "ppo.stop_tokens must be tokens of the tokenizer or texts that it can write, got "
                f"{text!r}, of which it makes {found.decode(errors='replace')!r}"
            )
    return make_stop_strings(texts, written)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token writes inside of a text, by its id; an id without a token writes nothing."""
    backend = tokenizer.backend_tokenizer
    decoder = repr(backend.decoder)  # of its parts, one after the other
    vocabulary = backend.get_vocab(with_added_tokens=True)
    written = [b""] * (max(vocabulary.values()) + 1)
    if "ByteLevel(" in decoder:
        byte_of = byte_alphabet()
        for token, i in vocabulary.items():
            is_bytes = all(character in byte_of for character in token)
            written[i] = bytes(map(byte_of.get, token)) if is_bytes else token.encode()
        return written
    # A text's first token may be written without its space, so that each comes after another one.
    first = next(i for token, i in vocabulary.items() if token.isalnum() and token.isascii())
    start = backend.decode([first], skip_special_tokens=False)
    ids = list(vocabulary.values())
    pairs = backend.decode_batch([[first, i] for i in ids], skip_special_tokens=False)
    for i, text in zip(ids, pairs, strict=True):
        written[i] = text[len(start) :].encode()
    if "ByteFallback(" in decoder:
        for byte in range(256):
            if (i := vocabulary.get(f"<0x{byte:02X}>")) is not None:
                written[i] = bytes([byte])
    return written


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(characters, printable + others, strict=True))


def make_stop_strings(texts: Sequence[str], token_bytes: Sequence[bytes]) -> StopStrings:
    """The automaton of some texts.

    A token that completes a string in its middle completes it: whatever follows in that token is
    part of the response.

    Args:
        texts: to find, one or more, none of them empty.
        token_bytes: V, what each token writes.

    Raises:
        ValueError: they are longer than `MAX_BYTES` together.
    """
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_BYTES:
        raise ValueError(
            f"the stop strings of ppo.stop_tokens must have at most {MAX_BYTES} bytes together, "
            f"got {size}"
        )
    moves = byte_transitions([text.encode() for text in texts])
    columns = {np.arange(len(moves), dtype=np.int32).tobytes(): 0}
    classes = np.empty(len(token_bytes), np.int32)
    for begin in range(0, len(token_bytes), CHUNK):
        after = token_transitions(moves, token_bytes[begin : begin + CHUNK])
        for i, column in enumerate(after, begin):
            classes[i] = columns.setdefault(column.tobytes(), len(columns))
    table = np.stack([np.frombuffer(column, np.int32) for column in columns], axis=1)
    return StopStrings(
        texts=tuple(texts),
        token_classes=tuple(classes.tolist()),
        transitions=tuple(map(tuple, table.tolist())),
    )


def byte_transitions(texts: Sequence[bytes]) -> np.ndarray:
    """[S, 256] int32: the state after one more byte; the last state is never left."""
    children: list[dict[int, int]] = [{}]  # of each state, whose text the path to it spells
    ends = set()
    for text in texts:
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        ends.add(state)
    moves = np.zeros((len(children), 256), np.int32)
    fallback = [0] * len(children)  # the state of the longest proper end that is a state
    queue = collections.deque([0])
    while queue:  # shorter texts first
        state = queue.popleft()
        if fallback[state] in ends:  # a string that is inside of another ends first
            ends.add(state)
        moves[state] = moves[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(moves[state, byte]) if state else 0
            moves[state, byte] = child
            queue.append(child)
    kept = [state for state in range(len(children)) if state not in ends]
    number = np.full(len(children), len(kept), np.int32)
    number[kept] = np.arange(len(kept))
    return np.concatenate([number[moves[kept]], np.full((1, 256), len(kept), np.int32)])


def token_transitions(moves: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """[tokens, S] int32: the state after each token, from each state."""
    lengths = np.array([len(x) for x in token_bytes])
    states = np.tile(np.arange(len(moves), dtype=np.int32), (len(token_bytes), 1))
    for i in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > i)
        byte = np.array([token_bytes[token][i] for token in longer])
        states[longer] = moves[states[longer], byte[:, None]]
    return states
