"""The first examples of each stage as its network will read them, what is in the loss marked."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.config.run import Config
from ppo_jax.config.stages import RewardSettings, SFTSettings
from ppo_jax.data.comparisons import RewardData
from ppo_jax.data.decode import TextDecoder, printable
from ppo_jax.data.encode import TokenizedTexts, TokenRow
from ppo_jax.data.packing import describe_packing
from ppo_jax.data.preferences import PREFERENCE_SCHEMAS
from ppo_jax.data.prompts import SAFETY, PromptData
from ppo_jax.data.readers import Schemas, other_columns, short_repr
from ppo_jax.data.records import DEMONSTRATION_SCHEMAS, PROMPT_SCHEMAS, RATING_SCHEMAS
from ppo_jax.inference.score import encode_responses
from ppo_jax.io.model_spec import ModelSpec, reread_reason
from ppo_jax.training.stage import training_data

EXAMPLES = 2  # of a stage
LONGEST = 1000  # characters of one stretch of text; the middle of a longer one is left out
FEW = 16  # token ids of an example; the middle of more is left out

Mark = Callable[[str], str]


def brackets(text: str) -> str:
    """A marked stretch of text where there are no colours."""
    return f"⟦{text}⟧"


def colours(text: str) -> str:
    """A marked stretch of text on a terminal: black on green, line by line."""
    return "\n".join(f"\033[30;42m{line}\033[0m" for line in text.split("\n"))


def previews(data: Mapping[str, Any], starts: Mapping[str, ModelSpec], mark: Mark) -> list[str]:
    """Examples of each stage."""
    examples = []
    if "sft" in data:
        examples.append(sft_preview(data["sft"][0], starts["sft"].tokenizer, mark))
    if "reward" in data:
        examples.append(reward_preview(data["reward"][0], starts["reward"].tokenizer, mark))
    for stage in ("ppo", "evaluate"):
        if stage in data:
            prompts = training_data(data[stage])
            examples.append(prompt_preview(stage, prompts, starts["ppo"].tokenizer, mark))
    if "ppo" in data and "score" in starts and reread_reason(starts["ppo"], starts["score"]):
        examples.append(reread_preview(data["ppo"], starts["score"], mark))
    return examples


def sft_preview(texts: TokenizedTexts, tokenizer: Any, mark: Mark) -> str:
    """The first texts to train on."""
    rows = itertools.islice(text_rows(texts), EXAMPLES)
    examples = [example(f"text {i}", row, tokenizer, mark) for i, row in enumerate(rows, start=1)]
    return "\n".join([f"sft: the loss is on what is {mark('marked')}", *examples])


def reward_preview(data: RewardData, tokenizer: Any, mark: Mark) -> str:
    """The first rated texts to train on, or all responses to the first prompts."""
    if data.groups is None:
        head = "reward: the score is read at the last token of a text"
        rows = itertools.islice(text_rows(data.texts), EXAMPLES)
        titles = [f"rated {', '.join(f'{x:g}' for x in given)}" for given in data.ratings]
        examples = [
            example(title, TokenRow(row.ids, [False] * len(row.ids)), tokenizer, mark)
            for title, row in zip(titles, rows, strict=False)
        ]
    else:
        head = f"reward: the score of a response, {mark('marked')}, is read at its last token"
        numbers = range(min(EXAMPLES, len(data.groups.rows)))
        examples = [x for i in numbers for x in group_examples(data, i, tokenizer, mark)]
    return "\n".join([head, *examples])


def group_examples(data: RewardData, number: int, tokenizer: Any, mark: Mark) -> Iterator[str]:
    """The responses to one prompt, and which of them each is better than."""
    groups = data.groups
    pairs = groups.pairs[number][groups.valid[number]].tolist()
    for place, row in enumerate(dict.fromkeys(groups.rows[number].tolist())):
        others = [str(worse + 1) for better, worse in pairs if better == place]
        title = f"prompt {number + 1}, response {place + 1}"
        title += f", better than {', '.join(others)}" if others else ""
        if others and groups.margins is not None:
            title += f" by a margin of {groups.margins[number, 0]:g}"
        mask = data.texts.mask[row]
        tokens, in_loss = data.texts.tokens[row][mask], data.texts.loss_mask[row][mask]
        yield example(title, TokenRow(tokens.tolist(), in_loss.tolist()), tokenizer, mark)


def prompt_preview(stage: str, data: PromptData, tokenizer: Any, mark: Mark) -> str:
    """The first prompts."""
    examples = []
    for i in range(min(EXAMPLES, len(data.texts))):
        ids = data.prompts.tokens[i][data.prompts.mask[i]].tolist()
        row = TokenRow(ids, [False] * len(ids))
        examples.append(example(f"prompt {i + 1}", row, tokenizer, mark, end=mark("...")))
        others = [name for name in data.columns if (name,) not in PROMPT_SCHEMAS]
        examples += [f"    {name}: {short_repr(data.columns[name][i])}" for name in others]
    return "\n".join([f"{stage}: the response begins at {mark('...')}", *examples])


def reread_preview(data: PromptData, score: ModelSpec, mark: Mark) -> str:
    """The first prompts as a reward model with a tokenizer of its own reads them."""
    prompts = data.texts[:EXAMPLES]
    rows, _ = encode_responses(prompts, [""] * len(prompts), [False] * len(prompts), score)
    examples = [
        example(f"prompt {i}", row, score.tokenizer, mark, end=mark("..."))
        for i, row in enumerate(text_rows(rows), start=1)
    ]
    return "\n".join([f"ppo: the reward model reads {mark('...')} by its own tokenizer", *examples])


def text_rows(texts: TokenizedTexts) -> Iterator[TokenRow]:
    """The texts in the order in which they stand, one a row or packed."""
    for row, mask in enumerate(texts.mask):
        segment_ids = mask.astype(int) if texts.segment_ids is None else texts.segment_ids[row]
        for number in range(1, segment_ids.max() + 1):
            chosen = np.flatnonzero(segment_ids == number)
            in_loss = texts.loss_mask[row, chosen]
            yield TokenRow(texts.tokens[row, chosen].tolist(), in_loss.tolist())


def example(title: str, row: TokenRow, tokenizer: Any, mark: Mark, end: str = "") -> str:
    """One row of tokens: its size, its text, its ids.

    Args:
        title: what it is.
        row: its tokens.
        tokenizer: to write them as text, special tokens included.
        mark: of stretches in the loss.
        end: what to show behind the text.
    """
    size = "1 token" if len(row.ids) == 1 else f"{len(row.ids)} tokens"
    if any(row.in_loss):
        size += f", {sum(row.in_loss)} marked"
    lines = (marked_text(row, tokenizer, mark) + end).split("\n")
    return "\n".join([f"  {title}: {size}", *(f"    | {x}" for x in lines), f"    {ids(row)}"])


def marked_text(row: TokenRow, tokenizer: Any, mark: Mark) -> str:
    """The text of a row, with the stretches in the loss marked."""
    decoder, out, begin = TextDecoder(tokenizer), "", 0
    for in_loss, stretch in itertools.groupby(row.in_loss):
        end = begin + len(list(stretch))
        text = shortened(printable(decoder.text(row.ids[:begin], row.ids[begin:end])))
        out += mark(text) if in_loss else text
        begin = end
    return out


def ids(row: TokenRow) -> str:
    """The ids of a row, the first and the last of them."""
    half = FEW // 2
    if len(row.ids) <= FEW:
        return f"ids {' '.join(map(str, row.ids))}"
    first, last = (" ".join(map(str, x)) for x in (row.ids[:half], row.ids[-half:]))
    return f"ids {first} ... {last}"


def shortened(text: str) -> str:
    """The text without the middle of what is longer than `LONGEST`."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def data_lines(config: Config, data: Mapping[str, Any]) -> list[str]:
    """A line for each data set of a run."""
    lines = []
    if "sft" in data:
        lines += text_lines("sft", config.sft, data["sft"], DEMONSTRATION_SCHEMAS)
        if config.sft.packing:
            lines.append(f"sft: packed {describe_packing(data['sft'][0])}")
    if "reward" in data:
        lines += reward_lines(config.reward, data["reward"][:2])
        if (references := data["reward"][2]) is not None:
            lines.append(texts_line("reward.reference_data", config.reward, references))
    for stage in ("ppo", "evaluate"):
        if stage in data:
            prompts = training_data(data[stage])
            lines.append(prompts_line(stage, getattr(config, stage).prompts, prompts))
    if "evaluate" in data and data["evaluate"][1] is not None:
        path, count = config.evaluate.ratings, len(data["evaluate"][1])
        lines.append(data_line("evaluate.ratings", path, count, {}, RATING_SCHEMAS))
    return lines


def text_lines(
    stage: str,
    settings: SFTSettings | RewardSettings,
    parts: Sequence[TokenizedTexts],
    schemas: Schemas,
) -> list[str]:
    """The training and the validation data: two files, or two parts of one."""
    used = [len(np.unique(part.records)) for part in parts]
    if settings.validation_data:
        fields = ("data", "validation_data")
        return [
            data_line(f"{stage}.{field}", getattr(settings, field), count, part.dropped, schemas)
            for field, count, part in zip(fields, used, parts, strict=True)
        ]
    dropped = sum((Counter(part.dropped) for part in parts), Counter())
    line = data_line(f"{stage}.data", settings.data, sum(used), dropped, schemas)
    return [f"{line}, {used[0]:,} to train and {used[1]:,} to validate"]


def reward_lines(settings: RewardSettings, parts: Sequence[RewardData]) -> list[str]:
    if settings.format == "ratings":
        return text_lines("reward", settings, [part.texts for part in parts], RATING_SCHEMAS)
    lines = text_lines("reward", settings, [part.texts for part in parts], PREFERENCE_SCHEMAS)
    groups = parts[0].groups
    if groups.rows.shape[1] > 2:
        lines.append(
            f"reward: {len(groups.row_pairs):,} comparisons to train on, among up to "
            f"{groups.rows.shape[1]} responses to a prompt"
        )
    return lines


def texts_line(field: str, settings: RewardSettings, texts: TokenizedTexts) -> str:
    count = len(np.unique(texts.records))
    return data_line(field, settings.reference_data, count, texts.dropped, DEMONSTRATION_SCHEMAS)


def prompts_line(stage: str, path: str, data: PromptData) -> str:
    kept = {*data.columns, *([] if data.prompts.is_safety is None else [SAFETY])}
    return data_line(f"{stage}.prompts", path, len(data.texts), data.dropped, PROMPT_SCHEMAS, kept)


def data_line(
    field: str,
    path: str | os.PathLike,
    used: int,
    dropped: Mapping[str, int],
    schemas: Schemas,
    kept: Collection[str] = (),
) -> str:
    """What became of the records of one data set.

    >>> data_line("sft.data", "a.jsonl", 1188, {"blank": 1, "repeated": 14}, [])
    'sft.data: a.jsonl: 1,203 read, 14 repeated, 1 blank; 1,188 used'

    Args:
        field: of the config.
        path: of the data set.
        used: records.
        dropped: {why: how many records}.
        schemas: those that it was read with.
        kept: the other columns that are kept.
    """
    read = used + sum(dropped.values())
    reasons = [f", {count:,} {why}" for why, count in Counter(dropped).most_common()]
    others = other_columns(path, schemas) if schemas else {}
    notes = {name: f"{name} ({note})" if note else name for name, note in others.items()}
    columns = {
        "kept": [note for name, note in notes.items() if name in kept],
        "not read": [note for name, note in notes.items() if name not in kept],
    }
    said = "".join(f"; columns {what}: {', '.join(x)}" for what, x in columns.items() if x)
    return f"{field}: {path}: {read:,} read{''.join(reasons)}{said}; {used:,} used"
