"""Tokenizers: loading, saving, padding, and training one from scratch."""

import copy
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_jax.io.hub import model_folder

if TYPE_CHECKING:  # slow to import, so each function that needs it does
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """The tokenizer in a model's folder.

    Where it has no padding token none is invented: in ppo_jax masks say what padding is.

    Args:
        path: as in `ppo_jax.hf.load_policy`; the folder holds a tokenizer.json.

    Raises:
        ValueError: there is no tokenizer.json, or it has no end-of-sequence token.
    """
    from transformers import PreTrainedTokenizerFast

    folder = model_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f'{folder} has no tokenizer.json. To convert an older form: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = declared_eos(folder, tokenizer)
    return tokenizer


def declared_eos(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The end-of-sequence token of the model's config.json: GPT-2 has it there alone."""
    path = folder / "config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    eos = eos[0] if isinstance(eos, list) and eos else eos
    token = tokenizer.convert_ids_to_tokens(eos) if isinstance(eos, int) else None
    if token is None:
        raise ValueError(
            f"{folder}: the tokenizer has no end-of-sequence token; name one as eos_token in "
            "tokenizer_config.json"
        )
    return token


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str | os.PathLike) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer.save_pretrained(folder)


def with_padding(
    tokenizer: "PreTrainedTokenizerFast", ends: Collection[int]
) -> "PreTrainedTokenizerFast":
    """A tokenizer whose padding token ends no text; one is added to a copy where it is needed.

    For code that tells padding by its id and not by a mask, as the sequence classification of
    transformers does: it reads the last token that is not the padding token.

    Args:
        tokenizer: whose padding token may be absent, or its EOS.
        ends: ids with which a text may end.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PADDING})
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer for a model from scratch; EOS is <|endoftext|>, id 0.

    Args:
        texts: what to learn the merges from.
        vocab_size: at most so many tokens; fewer when the texts hold no more pairs that repeat.
            `len(tokenizer)` is the size for the model.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and EOS, or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 1}, got {vocab_size}")
    texts = list(texts)
    if not any(texts):
        raise ValueError("a tokenizer cannot be trained on no text")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
