"""A tokenizer with a chat template, small enough to write its tokens down by hand."""

import tokenizers
import transformers

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As of Llama 2: no generation prompt, and the end of a turn is the end of the text.
INST = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }} </s>"
    "{% else %}{{ raise_exception('only users and assistants may speak') }}{% endif %}"
    "{% endfor %}"
)
# Shows what the assistant thought in its last turn alone, as some do.
FORGETFUL = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('|')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}\n"
    "{% endfor %}"
)
WORDS = "system user assistant Hi Ho Yes No [INST] [/INST]".split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, "\n", " ", *WORDS, "<unk>"])}


def make_tokenizer(template=CHATML, **special):
    """Words, spaces and line breaks are a token each; all others are <unk>."""
    model = tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\n| |[^\n ]+"), "isolated"
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    special = {"eos_token": "<|im_end|>", **special}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **special
    )


TOKENIZER = make_tokenizer()


def ids(text):
    """Ids of tokens with commas between them, "<s>,Hi, ,Ho" say; a line break is /."""
    return [VOCABULARY["\n" if token == "/" else token] for token in text.split(",")]


def turns(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": x} for i, x in enumerate(contents)]


def call(name, arguments="{}"):
    """A call of a tool, as messages have it."""
    return {
        "id": "abcdef123",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def learned(record):
    """The texts of a demonstration that are in the loss."""
    return [text for row in record.rows for text, in_loss in row if in_loss]
