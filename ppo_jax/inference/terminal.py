"""A conversation with a policy in a terminal, and responses to a file of prompts."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ppo_jax.core.types import Rollout
from ppo_jax.data.chat import Chat
from ppo_jax.data.decode import printable
from ppo_jax.data.encode import token_rows
from ppo_jax.data.messages import Message
from ppo_jax.data.records import load_prompt_rows, write_jsonl
from ppo_jax.inference.generate import decode_stream, generate, stream
from ppo_jax.inference.responses import read_rollouts
from ppo_jax.inference.score import sampled_scores
from ppo_jax.io.model_spec import reread_reason
from ppo_jax.io.stage_folder import Model
from ppo_jax.rollout.sampling import Sampling

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
    turns are dropped when it exceeds the model's context. Without a template, or without
    `use_template`, each line is continued by itself. KeyboardInterrupt ends an answer.
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
        conversation = [*turns, {"role": "user", "content": line}]
        try:
            turns, ids = newest_turns(conversation, model, room, use_template=use_template)
        except ValueError as error:
            show(f"({error})\n")
            continue
        key = jax.random.fold_in(jax.random.key(seed), number)
        tokens = stream(model, ids, key, sampling=sampling, temperature=temperature)
        chunks = decode_stream(model.tokenizer, tokens, ids, sampling.eos_ids)
        answer = show_chunks(chunks, show)
        turns.append({"role": "assistant", "content": answer})


def opening_line(use_template: bool) -> str:
    leave = "Ctrl-D leaves"
    if use_template:
        return f"A conversation; {NEW} begins another, Ctrl-C ends an answer, {leave}."
    return f"Without a chat template: each line is continued. Ctrl-C ends an answer, {leave}."


def show_chunks(chunks: Iterator[str], show: Callable[[str], Any]) -> str:
    """Show chunks of an answer as they come, up to Ctrl-C, and return them."""
    answer = ""
    try:
        for chunk in chunks:
            show(chunk)
            answer += chunk
    except KeyboardInterrupt:
        pass
    show("\n")
    return answer


def newest_turns(
    turns: list[Message], model: Model, room: int, *, use_template: bool
) -> tuple[list[Message], list[int]]:
    """The newest turns that fit into `room` tokens, and their tokens up to the model's turn.

    Without the template it is the last turn alone, as plain text.

    Raises:
        ValueError: there is no room even for the last one, or the template refuses it.
    """
    chat = Chat(model.tokenizer)
    for first in range(0 if use_template else len(turns) - 1, len(turns), 2):  # with its answer
        newest = turns[first:]
        text = chat.prompt(newest, "the conversation") if use_template else newest[0]["content"]
        [row] = token_rows([((text, False),)], model.tokenizer, append_eos=False)
        if 1 <= len(row.ids) <= room:
            return newest, row.ids
    raise ValueError(f"the line has {len(row.ids)} tokens, allowed are 1 to {room}")


def prompt_room(model: Model, sampling: Sampling) -> int:
    """Tokens that a prompt may have before a response of full length.

    Raises:
        ValueError: there is none, or the model is no policy.
    """
    if model.kind != "policy":
        raise ValueError("model must be a policy to generate text, got a reward model")
    length, most = sampling.response_length, model.config.max_length
    if length >= most:
        raise ValueError(f"response_length must be below the model's {most} tokens, got {length}")
    return most - length


def scored_room(policy: Model, scorer: Model, sampling: Sampling, score_at: str) -> int:
    """Tokens that a prompt may have for a reward model to read it with a response of full length.

    One that reads text leaves out what is too long, see `encode_responses`.

    Raises:
        ValueError: there is none.
    """
    if reread_reason(policy, scorer):
        return policy.config.max_length
    others = sampling.other_ends(policy.tokenizer.eos_token_id)
    length = sampling.response_length + (others and score_at == "eos")
    most = scorer.config.max_length
    if length >= most:
        behind = ", with an EOS put behind" if length > sampling.response_length else ""
        raise ValueError(
            f"response_length must be below the reward model's {most} tokens{behind}, got "
            f"{sampling.response_length}"
        )
    return most - length


def chat_in_terminal(model: Model, **settings: Any) -> None:
    """`chat` on standard input and output."""
    chat(model, typed_lines(), write, **settings)


def write(text: str) -> None:
    """Write on standard output; on a terminal, what would control it is spelt out."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def typed_lines() -> Iterator[str]:
    """Lines typed at the prompt "> ", up to Ctrl-D or Ctrl-C."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def respond_to_file(
    policy: Model,
    scorer: Model | None,
    *,
    prompts: str,
    out: str,
    copies: int,
    score_at: str = "eos",
    keep_best: bool = False,
    **how: Any,
) -> None:
    """Write responses to a file of prompts as JSON lines {"prompt", "response"}.

    Each prompt has `copies` lines. With a scorer, a reward model, a line says whether a stop token
    ended the response, "finished", and has the "score" of the tokens that were sampled, as in PPO
    with this `score_at`; a scorer with another tokenizer reads their text. Messages are written as
    the chat template renders them. With `keep_best` the lines are `best_demonstrations` instead.

    Raises:
        ValueError: `out` exists, the scorer is no reward model or is missing for the best, or a
            prompt is invalid or too long for one of the two; before anything is sampled.
    """
    if Path(out).exists():
        raise ValueError(f"the responses go into a new file, but {out} is there already")
    if scorer is not None and scorer.kind != "reward":
        raise ValueError("scores come from a reward model, got a policy")
    if keep_best and scorer is None:
        raise ValueError("the best responses are those of a reward model, got none")
    asked = load_prompt_rows(prompts, policy.tokenizer)
    texts = [prompt for _, prompt, _ in asked for _ in range(copies)]
    room = prompt_room(policy, how["sampling"])
    if scorer is not None:
        room = min(room, scored_room(policy, scorer, how["sampling"], score_at))
    responses, rollouts = respond(policy, texts, room=room, **how)
    rows = [{"prompt": p, "response": r} for p, r in zip(texts, responses, strict=True)]
    if scorer is not None:
        sampled = read_rollouts(responses, rollouts)
        scores = sampled_scores(scorer, policy, texts, sampled, score_at)
        more = zip(sampled.ended.tolist(), scores.values(), strict=True)
        rows = [r | {"finished": f, "score": s} for r, (f, s) in zip(rows, more, strict=True)]
    if keep_best:
        rows = best_demonstrations([row for _, _, row in asked], rows, copies)
        left_out = len(asked) - len(rows)
        print(f"{len(rows)} prompts; {left_out} more left out: all of their responses were cut off")
    write_jsonl(out, rows)


def best_demonstrations(
    asked: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], copies: int
) -> list[dict[str, Any]]:
    """The best response to each prompt as data for SFT: rejection sampling.

    Of equal scores the first. A response that was cut off is never it: SFT would end it with EOS.
    A prompt whose responses all were is left out.

    Args:
        asked: P rows of prompts: {"prompt"}, a text or messages, or {"messages"}.
        rows: P x copies of {"response", "finished", "score"}, those of a prompt side by side.
        copies: responses to a prompt.

    Returns:
        [{"prompt", "completion", "score"}], or {"messages", "score"} of messages, with the answer
        behind them; at most P.

    Reference: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.3.

    >>> said = [dict(response=r, finished=True, score=s) for r, s in ((" no", 0.0), (" yes", 1.0))]
    >>> best_demonstrations([{"prompt": "well:"}], said, 2)
    [{'prompt': 'well:', 'completion': ' yes', 'score': 1.0}]
    """
    found = []
    for number, row in enumerate(asked):
        ended = [x for x in rows[number * copies : (number + 1) * copies] if x["finished"]]
        if ended:
            best = max(ended, key=lambda x: x["score"])
            found.append(demonstration(row, best["response"]) | {"score": best["score"]})
    return found


def demonstration(row: Mapping[str, Any], response: str) -> dict[str, Any]:
    """A prompt's row with a response to it, as data for SFT."""
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if not isinstance(prompt, list):
        return {"prompt": prompt, "completion": response}
    asked = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    more = {"tools": row["tools"]} if row.get("tools") else {}
    return {"messages": [*asked, {"role": "assistant", "content": response}], **more}


def respond(
    model: Model,
    prompts: list[str],
    *,
    sampling: Sampling,
    room: int | None = None,
    **settings: Any,
) -> tuple[list[str], list[Rollout]]:
    """One response to each prompt, as `generate` gives them.

    A prompt of more than `room` tokens is an error; None is as many as leave the model room for a
    whole response.
    """
    return generate(
        model,
        prompts,
        sampling=sampling,
        **settings,
        max_prompt_length=prompt_room(model, sampling) if room is None else room,
    )
