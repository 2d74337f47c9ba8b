"""A conversation with a policy in a terminal, and responses to a file of prompts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from ppo_jax.data.chat import Chat, Message
from ppo_jax.data.encode import token_rows
from ppo_jax.data.records import load_prompts, write_jsonl
from ppo_jax.inference.generate import decode_stream, generate, stream
from ppo_jax.inference.score import score_texts
from ppo_jax.io.stage_folder import Model
from ppo_jax.rollout.sampling import Sampling

AT_A_TIME = 64  # prompts
NEW = "/new"


def chat(
    model: Model,
    lines: Iterable[str],
    show: Callable[[str], Any],
    *,
    sampling: Sampling,
    temperature: float,
    seed: int,
    use_template: bool = True,
) -> None:
    """Answer line after line, the answers shown as they are sampled.

    With a chat template the lines are turns of one conversation, which "/new" ends; its oldest
    turns are left out when it outgrows the model. Without one each line is continued by itself.

    Args:
        model: a policy.
        lines: what the user says; KeyboardInterrupt while an answer is shown ends that answer.
        show: takes pieces of text.
        sampling: length, stop tokens and filters.
        temperature: 0 is greedy.
        seed: of the sampling.
        use_template: False continues lines even if the tokenizer has a template.
    """
    model = dataclasses.replace(model, params=jax.device_put(model.params))
    room = prompt_room(model, sampling)
    use_template = use_template and bool(model.tokenizer.chat_template)
    show(f"{opening_line(use_template)}\n")
    turns: list[Message] = []
    for number, line in enumerate(lines):
        if line.strip() == NEW:
            turns = []
        if line.strip() in ("", NEW):
            continue
        said = [*turns, {"role": "user", "content": line}]
        try:
            turns, ids = newest_turns(said, model, room, use_template=use_template)
        except ValueError as error:
            show(f"({error})\n")
            continue
        key = jax.random.fold_in(jax.random.key(seed), number)
        tokens = stream(model, ids, key, sampling=sampling, temperature=temperature)
        answer = show_answer(decode_stream(model.tokenizer, tokens), show)
        turns.append({"role": "assistant", "content": answer})


def opening_line(use_template: bool) -> str:
    leave = "Ctrl-D leaves"
    if use_template:
        return f"A conversation; {NEW} begins another, Ctrl-C ends an answer, {leave}."
    return f"Without a chat template: each line is continued. Ctrl-C ends an answer, {leave}."


def show_answer(pieces: Iterator[str], show: Callable[[str], Any]) -> str:
    """Show pieces as they come, up to Ctrl-C; all of what was shown."""
    answer = ""
    try:
        for piece in pieces:
            show(piece)
            answer += piece
    except KeyboardInterrupt:
        pass
    show("\n")
    return answer


def newest_turns(
    turns: list[Message], model: Model, room: int, *, use_template: bool
) -> tuple[list[Message], list[int]]:
    """The newest turns that there is room for, and their tokens up to where the model speaks.

    Without the template it is the last turn alone, as it stands.

    Raises:
        ValueError: there is no room even for the last one, or the template refuses it.
    """
    chat = Chat(model.tokenizer)
    for first in range(0 if use_template else len(turns) - 1, len(turns), 2):  # with its answer
        left = turns[first:]
        text = chat.prompt(left, "the conversation") if use_template else left[0]["content"]
        [row] = token_rows([((text, False),)], model.tokenizer, append_eos=False)
        if 1 <= len(row.ids) <= room:
            return left, row.ids
    raise ValueError(f"the line has {len(row.ids)} tokens, allowed are 1 to {room}")


def prompt_room(model: Model, sampling: Sampling) -> int:
    """Tokens that a prompt may have before a response of full length.

    Raises:
        ValueError: there is none, or the model gives no text.
    """
    if model.kind != "policy":
        raise ValueError("model must be a policy to generate text, got a reward model")
    length, most = sampling.response_length, model.config.max_length
    if length >= most:
        raise ValueError(f"response_length must be below the model's {most} tokens, got {length}")
    return most - length


def chat_in_terminal(model: Model, **settings: Any) -> None:
    """`chat` with what is typed and what is printed; `settings` are those of `chat`."""
    chat(model, typed_lines(), functools.partial(print, end="", flush=True), **settings)


def typed_lines() -> Iterator[str]:
    """What is typed at the prompt "> ", up to Ctrl-D or Ctrl-C."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def respond_to_file(
    policy: Model, scorer: Model | None, *, prompts: str, out: str, copies: int, **how: Any
) -> None:
    """Write responses to a file of prompts as JSON lines {"prompt", "response"}.

    Args:
        policy: what responds.
        scorer: a reward model whose "score" of prompt and response each line then has, or None.
        prompts: a file as `load_prompts` reads it; messages are written as the template does.
        out: the file to write; it must not be there.
        copies: responses to each prompt.
        **how: as in `respond`.

    Raises:
        ValueError: `out` is there, the scorer is no reward model, or a prompt is not usable.
    """
    if Path(out).exists():
        raise ValueError(f"the responses go into a new file, but {out} is there already")
    if scorer is not None and scorer.kind != "reward":
        raise ValueError("scores come from a reward model, got a policy")
    asked = [prompt for prompt in load_prompts(prompts, policy.tokenizer) for _ in range(copies)]
    responses = respond(policy, asked, **how)
    rows = [{"prompt": p, "response": r} for p, r in zip(asked, responses, strict=True)]
    if scorer is not None:
        scores = score_texts(scorer, [p + r for p, r in zip(asked, responses, strict=True)])
        rows = [row | {"score": float(x)} for row, x in zip(rows, scores, strict=True)]
    write_jsonl(out, rows)


def respond(
    model: Model,
    prompts: list[str],
    *,
    sampling: Sampling,
    temperature: float,
    seed: int,
) -> list[str]:
    """One response to each prompt; a prompt that leaves no room for a whole one is an error."""
    responses, _ = generate(
        model,
        prompts,
        sampling=sampling,
        temperature=temperature,
        seed=seed,
        batch_size=min(len(prompts), AT_A_TIME),
        max_prompt_length=prompt_room(model, sampling),
    )
    return responses
