"""The tokenizer of a GGUF file, rebuilt: byte-level BPE, and BPE of SentencePiece."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ppo_jax.io.gguf.header import Metadata
from ppo_jax.models.families.base import short

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of GGUF
NO_ID = 2**32 - 1
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# How texts are split before byte-level BPE: the pattern, or None for GPT-2's own.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": None,
    "smollm": None,
    "refact": None,  # Granite's
    "olmo": None,  # of GPT-NeoX and what took its tokenizer over
    "llama-bpe": LLAMA3_PATTERN,
    "dbrx": LLAMA3_PATTERN,  # of OLMo 2 and 3
    "smaug-bpe": LLAMA3_PATTERN,  # of SmolLM3
    "qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
}
SINGLE_DIGITS = ("smollm", "refact")
COMPOSED = ("qwen2", "olmo")  # accents and their letters become one


def read_tokens(metadata: Metadata) -> list[str]:
    """The texts of all tokens, by id."""
    refuse_missing(metadata, ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
    tokens, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    is_texts = isinstance(tokens, list) and all(isinstance(x, str) for x in tokens)
    if not is_texts or not tokens or len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens must be different texts")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must be {len(tokens)} numbers")
    return tokens


def special_id(metadata: Metadata, role: str) -> int | None:
    """The id of a special token, None where there is none."""
    key = f"tokenizer.ggml.{role}_token_id"
    value, size = metadata.get(key), len(metadata["tokenizer.ggml.tokens"])
    if value is None or value == NO_ID:
        return None
    if type(value) is not int or not 0 <= value < size:
        raise ValueError(f"{key} must be the id of one of {size} tokens, got {short(value)}")
    return value


def stop_tokens(metadata: Metadata) -> list[int | None]:
    """What ends a text, and what ends a turn or a message where these are other tokens."""
    ids = [special_id(metadata, role) for role in ("eos", "eot", "eom")]
    return ids[:1] + [i for i in dict.fromkeys(ids[1:]) if i not in (None, ids[0])]


def build_tokenizer(metadata: Metadata, vocab_size: int):
    """The tokenizer that a GGUF file describes: byte-level BPE, or BPE of SentencePiece."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    check_tokenizer(ggml)
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    make = sentencepiece_bpe if ggml["model"] == "llama" else byte_level_bpe
    backend = make(ggml)
    special = (CONTROL, UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (*special, USER_DEFINED)
        ]
    )
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"{vocab_size} tokens give a tokenizer of {backend.get_vocab_size()}")
    named = {role: special_id(metadata, key) for role, key in ROLES.items()}
    around = {role: i for role, i in named.items() if adds(ggml, role)}
    for role, i in around.items():
        if i is None:
            raise ValueError(f"tokenizer.ggml.add_{role}_token needs a {role}_token_id")
    if around:
        bos, eos = ([tokens[around[role]]] if role in around else [] for role in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], special_tokens=[(tokens[i], i) for i in around.values()]
        )
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer.chat_template must be a text, got {short(template)}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        model_max_length=metadata[metadata["general.architecture"] + ".context_length"],
        **{f"{role}_token": tokens[i] for role, i in named.items() if i is not None},
    )


def adds(ggml: Metadata, role: str) -> bool:
    """Whether BOS or EOS is put around a text, with the defaults of llama.cpp."""
    by_default = role == "bos" and (ggml["model"] == "llama" or ggml.get("pre") == "llama-bpe")
    value = ggml.get(f"add_{role}_token", by_default)
    if not isinstance(value, bool):
        raise ValueError(f"tokenizer.ggml.add_{role}_token must be a boolean, got {short(value)}")
    return value


def byte_level_bpe(ggml: Metadata):
    """The tokenizer of GPT-2 and what came of it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = ggml["pre"]
    if PATTERNS[name]:
        split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        before = [split, level]
    else:
        before = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if name in SINGLE_DIGITS:
        before.insert(0, pre_tokenizers.Digits(individual_digits=True))
    vocab = {token: i for i, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in text_list(ggml, "merges")]
    # Llama 3 has words that its merges do not make.
    options = {"ignore_merges": True} if name == "llama-bpe" else {}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    if name in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = before[0] if len(before) == 1 else pre_tokenizers.Sequence(before)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(ggml: Metadata):
    """The tokenizer of Llama 2: pieces with scores, of which the highest is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = ggml["tokens"], ggml.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores must be {len(tokens)} numbers")
    if not all(isinstance(x, float) and math.isfinite(x) for x in scores):
        raise ValueError("tokenizer.ggml.scores must be finite numbers")
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = ggml["token_type"]
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    model = models.BPE(
        vocab=vocab,
        merges=merges_of(vocab, scores, kinds),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    space, prefix = "\u2581", ggml.get("add_space_prefix", True)
    before = [normalizers.Prepend(space)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    after = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    after += [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(after)
    return backend


def merges_of(vocab: Mapping[str, int], scores: list[float], kinds: list[int]) -> list[tuple]:
    """Pairs of pieces that make another one, those of the highest score first."""
    pairs = []
    for token, i in vocab.items():
        if kinds[i] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[i], i, left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(pairs)]


def text_list(ggml: Metadata, key: str) -> list[str]:
    value = ggml.get(key)
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"tokenizer.ggml.{key} must be a list of texts")
    return value


def check_tokenizer(ggml: Metadata) -> None:
    """Refuse a tokenizer that would not be rebuilt exactly."""
    kind, splitter = ggml.get("model"), ggml.get("pre")
    if kind != "llama" and (kind != "gpt2" or splitter not in PATTERNS):
        raise ValueError(
            f"GGUF tokenizer {short(kind)} with pre-tokenizer {short(splitter)} is not supported; "
            f"only 'llama', or 'gpt2' with one of {sorted(PATTERNS)}, is"
        )
    options: dict[str, Callable[[Any], bool]] = {
        "add_space_prefix": lambda on: isinstance(on, bool) and (kind == "llama" or not on),
        "remove_extra_whitespaces": lambda on: on is False,
        "precompiled_charsmap": lambda table: table == [],
    }
    for option, holds in options.items():
        if option in ggml and not holds(ggml[option]):
            value = short(ggml[option])
            raise ValueError(f"GGUF option tokenizer.ggml.{option}={value} is not supported")


def refuse_missing(metadata: Metadata, required: list[str]) -> None:
    if missing := [key for key in required if key not in metadata]:
        raise ValueError(f"its metadata lack {missing}")
