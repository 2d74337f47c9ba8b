"""Tokenizers: loading, saving, padding, training one from scratch, and trimming a vocabulary.

The head of a language model costs as much as its vocabulary is large. A run whose texts use a
third of the tokens can drop the other two thirds, of the tokenizer and of the parameters.

Dimension key: V vocabulary.
"""

import copy
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_jax.config.run import ModelSettings
from ppo_jax.core.types import Params
from ppo_jax.data.chat import Chat
from ppo_jax.data.readers import short_repr
from ppo_jax.data.templates import read_template
from ppo_jax.io.hub import model_folder
from ppo_jax.io.integrity import file_inside, read_json, reading_file

if TYPE_CHECKING:  # slow to import, so each function that needs it does
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
STOP_TOKENS = "declared_stop_tokens"  # of tokenizer_config.json, see `declared_stops`
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE = "chat_template.jinja"


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model, whose path is as in `ppo_jax.hf.load_policy`.

    Where it has no padding token none is added: in ppo_jax masks say what padding is.

    Raises:
        OSError: a file may not be read.
        ValueError: there is no tokenizer.json, it is damaged, two tokens have one id, or it has no
            end-of-sequence token.
    """
    folder = model_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f'{folder} has no tokenizer.json. To convert an older form: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = declared_eos(folder, tokenizer)
    set_declared_stops(tokenizer, read_declared_stops(folder, tokenizer))
    return tokenizer


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder, whose files have been looked at before a library reads them.

    Raises:
        OSError: a file may not be read.
        ValueError: a file is damaged, names one outside of the folder, or two tokens have one id.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    for name in TOKENIZER_FILES:
        content = read_json(folder / name) if (folder / name).exists() else {}
        if type(length := content.get("model_max_length", 1)) not in (int, float):
            got = short_repr(length)
            raise ValueError(f"{folder / name}: model_max_length must be a number, got {got}")
        for key in ("fast_tokenizer_files", "gguf_file"):
            others = content.get(key) or []
            for other in others if isinstance(others, list) else [others]:
                file_inside(folder, other, f"{folder / name}: {key}")
    if (folder / TEMPLATE).exists():
        with reading_file(folder / TEMPLATE):
            (folder / TEMPLATE).read_text(encoding="utf-8")
    try:
        with reading_file(folder / "tokenizer_config.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer.decode(tokenizer("A text")["input_ids"])  # which some files fail only then
    except ValueError:
        with reading_file(folder / "tokenizer.json"):
            Tokenizer.from_file(str(folder / "tokenizer.json"))  # or it was not this one
        raise
    # Added tokens may rename one of the vocabulary, which then stands there twice.
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if (num_ids := len(set(vocab.values()))) < len(vocab):
        raise ValueError(f"{folder / 'tokenizer.json'}: {len(vocab)} tokens have {num_ids} ids")
    return tokenizer


def declared_eos(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The end-of-sequence token of the model's config.json: GPT-2 has it only there."""
    path = folder / "config.json"
    [token, *_] = [*tokens_of(declared_ids(path) or [], tokenizer), None]
    if token is None:
        raise ValueError(
            f"{folder}: the tokenizer has no end-of-sequence token; name one as eos_token in "
            "tokenizer_config.json"
        )
    return token


def declared_stops(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The tokens that end a response by the model's own files, besides the tokenizer's EOS.

    They are kept in tokenizer_config.json wherever the tokenizer is saved.
    """
    return getattr(tokenizer, "init_kwargs", {}).get(STOP_TOKENS, [])


def set_declared_stops(tokenizer: "PreTrainedTokenizerFast", tokens: Iterable[str]) -> None:
    """See `declared_stops`."""
    tokenizer.init_kwargs[STOP_TOKENS] = [x for x in tokens if x != tokenizer.eos_token]


def read_declared_stops(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """All tokens of `eos_token_id` in generation_config.json; where there is none, those that were
    saved with the tokenizer, or else those of config.json.

    Raises:
        ValueError: they are no tokens; in config.json, where a default remains in many files, those
            that are none are left out.
    """
    path = folder / "generation_config.json"
    ids = declared_ids(path)
    if ids is not None:
        tokens = tokens_of(ids, tokenizer)
        if None in tokens:
            raise ValueError(
                f"{path}: eos_token_id must be ids of the tokenizer's tokens, got {ids}"
            )
        return tokens
    if STOP_TOKENS in tokenizer.init_kwargs:
        tokens, vocabulary = declared_stops(tokenizer), tokenizer.get_vocab()
        if not isinstance(tokens, list) or not all(str(token) in vocabulary for token in tokens):
            path = folder / "tokenizer_config.json"
            raise ValueError(f"{path}: {STOP_TOKENS} must be tokens, got {short_repr(tokens)}")
        return tokens
    tokens = tokens_of(declared_ids(folder / "config.json") or [], tokenizer)
    return [token for token in tokens if token is not None]


def declared_ids(path: Path) -> list[Any] | None:
    """`eos_token_id` in a JSON file as a list, unchecked; None where there is none."""
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    return ids if isinstance(ids, list | None) else [ids]


def tokens_of(ids: list[Any], tokenizer: "PreTrainedTokenizerFast") -> list[str | None]:
    """The tokens of some ids; None for what is no id of one."""
    are_ids = [type(i) is int and 0 <= i < 2**32 for i in ids]
    pairs = zip(ids, are_ids, strict=True)
    return [tokenizer.convert_ids_to_tokens(i) if is_id else None for i, is_id in pairs]


def declared_strings(folder: Path) -> list[str]:
    """`stop_strings` of a model's generation_config.json.

    Raises:
        ValueError: they are no texts.
    """
    path = folder / "generation_config.json"
    value = read_json(path).get("stop_strings") if path.is_file() else None
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: stop_strings must be a text or a list of texts, got {value!r}")
    return texts


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str | os.PathLike) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer.save_pretrained(folder)


def with_chat(
    tokenizer: "PreTrainedTokenizerFast", settings: ModelSettings
) -> "PreTrainedTokenizerFast":
    """The same tokenizer, its chat template and the date that it writes as in the settings.

    Raises:
        ValueError: the file of the template is not there, or holds none.
    """
    if settings.chat_template:
        tokenizer.chat_template = read_template(settings.chat_template)
        Chat(tokenizer).check(f"model.chat_template: {settings.chat_template}")
    tokenizer.chat_date = settings.chat_date  # read by `data.chat.Chat`; it is not saved
    return tokenizer


def table_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Rows that a token table needs: the largest id and one. `len` is less where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def with_padding(
    tokenizer: "PreTrainedTokenizerFast", ends: Collection[int]
) -> "PreTrainedTokenizerFast":
    """A tokenizer whose padding token is not in `ends`, the ids with which a text may end.

    One is added to a copy where it is needed: for code that recognises padding by its id and not by
    a mask, as the sequence classification of transformers, which reads the last token that is not
    the padding token.

    Raises:
        ValueError: one cannot be added.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    vocab, tokenizer = tokenizer.get_vocab(), copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PADDING})
    # A new token gets the number of tokens as its id.
    if PADDING not in vocab and tokenizer.pad_token_id in vocab.values():
        raise ValueError(
            "the tokenizer needs a pad_token of its own: its ids have holes, and a new token would "
            f"get the id {tokenizer.pad_token_id}, which another has"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer for a model from scratch; EOS is <|endoftext|>, id 0.

    It has at most `vocab_size` tokens, fewer when the texts have no more pairs that repeat:
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


def trim_vocabulary(
    tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]
) -> tuple["PreTrainedTokenizerFast", np.ndarray]:
    """Keep the tokens that some texts use, and those that encode any other text.

    Kept are the tokens of the encoded texts, every token that they are merged from, all bytes, and
    all special and added tokens, and those that end a response. The texts are encoded as before,
    with new ids in the old order; whatever other text the full tokenizer can encode the small one
    can too, in more tokens.

    Returns:
        (the small tokenizer, kept ids [V_small] int, ascending: the old id of each new one).

    Raises:
        ValueError: the tokenizer is neither byte-level BPE nor BPE that falls back to bytes.
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
    kept_ids |= set(tokenizer.convert_tokens_to_ids(declared_stops(tokenizer)))
    model, vocab = spec["model"], spec["model"]["vocab"]
    basic = byte_tokens(model) | {model["unk_token"]}
    words = {token for token, i in vocab.items() if i in kept_ids or token in basic}
    model["merges"] = close_over_merges(words, model["merges"])
    kept = np.array(sorted(kept_ids | {vocab[token] for token in words}))
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    model["vocab"] = {token: new_id[i] for token, i in vocab.items() if i in new_id}
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    renumber_special_tokens(spec["post_processor"], new_id)
    return with_backend(tokenizer, Tokenizer.from_str(json.dumps(spec))), kept


def check_bpe(spec: dict[str, Any]) -> None:
    """Refuse a tokenizer that cannot encode every text in bytes."""
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
    """The tokens of single bytes."""
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
        parents_of_word = {token for pair in parents.get(new.pop(), []) for token in pair}
        new.extend(parents_of_word - words)
        words |= parents_of_word
    return [pair for pair in merges if {*pair, "".join(pair)} <= words]


def renumber_special_tokens(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """Change, in place, the ids that a post-processor adds around texts."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        renumber_special_tokens(part, new_id)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, i = processor[name]
            processor[name] = [token, new_id[i]]


def with_backend(tokenizer: "PreTrainedTokenizerFast", backend: Any) -> "PreTrainedTokenizerFast":
    """The same tokenizer (special tokens, chat template) with another vocabulary."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **{STOP_TOKENS: declared_stops(tokenizer)},
        **tokenizer.special_tokens_map,
    )


def trim_params(params: Params, kept_ids: np.ndarray) -> Params:
    """The parameters of any network for a vocabulary trimmed by `trim_vocabulary`.

    They have the rows `kept_ids` of the token table and those columns of a head of logits; all
    other leaves are shared with `params`. The caller sets `vocab_size=len(kept_ids)` in the config.

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
