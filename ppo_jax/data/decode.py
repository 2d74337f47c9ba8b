"""Text from tokens, such that the text has these tokens: the inverse of `encode`."""

import functools
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from ppo_jax.data.encode import leading_tokens, token_ids

BROKEN = "\N{REPLACEMENT CHARACTER}"  # a character whose bytes are not all there
MOST_BYTES = 4  # of a character
DIRECTION = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # Unicode's UAX 9


class TextDecoder:
    """The text of tokens that stand behind others.

    Special tokens are written as they are. What is between them is decoded with all that is before
    it, since the first space of a SentencePiece text is the tokenizer's: "▁good" is "good" where a
    text begins and " good" behind "▁is".
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.leading = leading_tokens(tokenizer)
        self.added = tokenizer.added_tokens_decoder
        self.is_split = text_is_split(tokenizer)

    def text(self, before: Sequence[int], ids: Iterable[int]) -> str:
        """The text of `ids` behind the tokens `before`."""
        context, text = self.context(before), ""
        for is_added, group in itertools.groupby(ids, self.added.__contains__):
            stretch = list(group)
            if is_added:
                text += "".join(map(self.written, stretch))
                context = self.context(stretch)
            else:
                text += self.continued(context, stretch)
        return text

    def context(self, before: Sequence[int]) -> list[int]:
        """The last of some tokens, as far as they are decoded with what follows them."""
        num_leading = len(self.leading)
        begin = num_leading if list(before[:num_leading]) == self.leading else 0
        for place in range(len(before) - 1, begin - 1, -1):
            if before[place] in self.added:
                begin = place + self.is_split
                break
        return list(before[begin:])

    def written(self, i: int) -> str:
        """The text of an added token; a special one is written as it is."""
        text = self.decode([i])
        is_text = not self.added[i].special and token_ids([text], self.tokenizer) == [[i]]
        return text if is_text else self.added[i].content

    def continued(self, context: list[int], ids: list[int]) -> str:
        """The text of tokens without an added one behind those that they are decoded with."""
        start, whole = self.decode(context), self.decode(context + ids)
        # Bytes that are no character behind those of one take that with them.
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens without those before them.

        Bytes of a character that is cut off at the end are decoded apart: where bytes are tokens of
        their own, the decoder would give up the whole characters before them, too.
        """
        decode = functools.partial(
            self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = decode(ids)
        if text.endswith(BROKEN):
            for cut in range(len(ids) - 1, max(0, len(ids) - MOST_BYTES), -1):
                if not (whole := decode(ids[:cut])).endswith(BROKEN):
                    return whole + decode(ids[cut:])
        return text


def text_is_split(tokenizer: Any) -> bool:
    """Whether text behind a special token is tokenised as where a text begins.

    So it is with the tokenizer of Llama 2; others put the space of SentencePiece only where a text
    begins, or none at all.
    """
    for i, token in tokenizer.added_tokens_decoder.items():
        alone, behind = token_ids(["a", token.content + "a"], tokenizer)
        if behind[:1] == [i]:  # some of them match only as a whole word
            return behind[1:] == alone
    return True


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor, or turn its text round, spelt out.

    >>> print(printable("a\\nb\\t\\033[2Jc\\u202ed"))
    a
    b\\t\\x1b[2Jc\\u202ed
    """
    return "".join(repr(c)[1:-1] if moves_cursor(c) else c for c in text)


def moves_cursor(character: str) -> bool:
    """Control characters but the line break, marks of direction, separators, lone surrogates."""
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return (is_control and character != "\n") or unicodedata.bidirectional(character) in DIRECTION
