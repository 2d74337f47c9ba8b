"""Vocabulary trimming: a model and its tokenizer for the tokens that some texts use.

The head of a language model costs as much as its vocabulary is large. A run whose texts use a
third of the tokens can drop the other two thirds, of the tokenizer and of the parameters.

Dimension key: V vocabulary.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.core.types import Params

if TYPE_CHECKING:  # slow to import, so each function that needs it does
    from transformers import PreTrainedTokenizerFast


def trim_vocabulary(
    tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]
) -> tuple["PreTrainedTokenizerFast", np.ndarray]:
    """Keep the tokens that some texts use, and those without which no other text can be written.

    Kept are the tokens of the encoded texts, every token on the way from bytes to these, all
    bytes, and all special and added tokens. The texts are encoded as before, with new ids in the
    old order; whatever other text the full tokenizer can write the small one can too, in more
    tokens.

    Args:
        tokenizer: byte-level BPE, or BPE that falls back to bytes.
        texts: all texts whose encoding is to stay.

    Returns:
        (the small tokenizer, kept ids [V_small] int, ascending: the old id of each new one).

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    from tokenizers import Tokenizer

    texts = list(texts)
    if not texts:
        raise ValueError("a vocabulary cannot be trimmed to no text")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    spec = json.loads(backend.to_str())
    check_bpe(spec)
    kept_ids = {i for encoding in backend.encode_batch(texts) for i in encoding.ids}
    kept_ids |= {token["id"] for token in spec["added_tokens"]}
    model, vocab = spec["model"], spec["model"]["vocab"]
    basic = byte_tokens(model) | {model["unk_token"]}
    words = {token for token, i in vocab.items() if i in kept_ids or token in basic}
    model["merges"] = close_over_merges(words, model["merges"])
    kept = np.array(sorted(kept_ids | {vocab[token] for token in words}))
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    model["vocab"] = {token: new_id[i] for token, i in vocab.items() if i in new_id}
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    renumber(spec["post_processor"], new_id)
    return with_backend(tokenizer, Tokenizer.from_str(json.dumps(spec))), kept


def check_bpe(spec: dict[str, Any]) -> None:
    """Refuse a tokenizer whose texts cannot always be written in bytes."""
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"only a BPE vocabulary can be trimmed, this one is {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"BPE with {option}={model[option]!r} cannot be trimmed")
    is_byte_level = '"ByteLevel"' in json.dumps(spec["pre_tokenizer"])
    if not (is_byte_level or model["byte_fallback"]):
        raise ValueError("only BPE over bytes, or with byte_fallback, can be trimmed")


def byte_tokens(model: dict[str, Any]) -> set[str]:
    """What stands for single bytes in the vocabulary."""
    from tokenizers import pre_tokenizers

    if model["byte_fallback"]:
        return {f"<0x{byte:02X}>" for byte in range(256)}
    return set(pre_tokenizers.ByteLevel.alphabet())


def close_over_merges(words: set[str], merges: list[list[str]]) -> list[list[str]]:
    """Add to `words` everything they are merged from; the merges among them, in order.

    Encoding a text takes at each step the first merge of the list that applies. All steps of the
    old encoding are among the kept merges and the order is the same, so the steps are too.
    """
    parents: dict[str, list[list[str]]] = {}
    for pair in merges:
        parents.setdefault("".join(pair), []).append(pair)
    new = list(words)
    while new:
        parts = {part for pair in parents.get(new.pop(), []) for part in pair}
        new.extend(parts - words)
        words |= parts
    return [pair for pair in merges if {*pair, "".join(pair)} <= words]


def renumber(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """Change, in place, the ids that a post-processor puts around texts."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        renumber(part, new_id)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, i = processor[name]
            processor[name] = [token, new_id[i]]


def with_backend(tokenizer: "PreTrainedTokenizerFast", backend: Any) -> "PreTrainedTokenizerFast":
    """A tokenizer with another vocabulary and the special tokens and chat template of this one."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )


def trim_params(params: Params, kept_ids: np.ndarray) -> Params:
    """The parameters of a model for a vocabulary trimmed by `trim_vocabulary`.

    The caller sets `vocab_size=len(kept_ids)` in the model's config.

    Args:
        params: of a policy, value or reward network.
        kept_ids: [V_small] int, the old id of each new one.

    Returns:
        The tree with those rows of the token table and those columns of a head of logits; all
        other leaves are shared with `params`.

    Raises:
        ValueError: an id is outside the token table.
    """
    tokens = params["embed"]["tokens"]
    if kept_ids.min() < 0 or kept_ids.max() >= len(tokens):
        raise ValueError(f"kept_ids must be in 0..{len(tokens) - 1}, got {kept_ids.max()}")
    params = {**params, "embed": {**params["embed"], "tokens": tokens[kept_ids]}}
    if "head" in params and params["head"]["kernel"].shape[-1] == len(tokens):
        params["head"] = {**params["head"], "kernel": params["head"]["kernel"][:, kept_ids]}
    return params
