"""Conversations as rows hold them: messages, read and checked.

A message is {"role": ..., "content": text}, the role one of `ROLES`; an assistant's may have
"tool_calls", as chat templates read them: [{"type": "function", "function": {"name": ...,
"arguments": {...}}}]. Its other keys are for the template. A `place`, "file:line", is for errors.
What a chat template makes of messages is in `chat`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ppo_jax.data.readers import Row, read_string, short_repr, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {  # "from" -> role
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",  # its value is the JSON text of the call
    "observation": "tool",
}
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # what the assistant thought: one of them

Message = dict[str, Any]


class Form(NamedTuple):
    """How a template reads messages, of the ways that there are."""

    in_parts: bool = False  # a content as a list of parts
    json_arguments: bool = False  # the arguments of a call as their JSON text
    null_content: bool = False  # no content, not an empty one, beside calls

    def of(self, message: Message) -> Message:
        """The message in this form."""
        content, calls = message["content"], message.get("tool_calls", [])
        if self.in_parts:
            message = {**message, "content": [{"type": "text", "text": content}]}
        if calls and self.null_content and not content.strip():
            message = {key: value for key, value in message.items() if key != "content"}
        if calls and self.json_arguments:
            message = {**message, "tool_calls": [with_json_arguments(call) for call in calls]}
        return message


def with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


class NotRendered(ValueError):
    """The chat template makes no text of a row's messages, or none to learn from."""


def read_messages(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """The messages under a key of a row, checked.

    A null counts as absent, but in the arguments of a call.

    Raises:
        NotRendered: the arguments of a call are no JSON.
        ValueError: which message is wrong, and why.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {key} must be a list of messages, got {short_repr(value)}")
    return tuple(read_message(message, f"{key}[{i}]", place) for i, message in enumerate(value))


def read_message(value: Any, key: str, place: str) -> Message:
    fields = without_nulls(value, keep="arguments") if isinstance(value, dict) else {}
    if {"from", "value"} <= fields.keys():
        fields = from_sharegpt(fields)
    calls = read_calls(fields.pop("tool_calls", []), f"{place}: {key}")
    if calls:
        fields.setdefault("content", "")
    if not {"role", "content"} <= fields.keys():
        raise ValueError(f"{place}: {key} must have role and content, got {short_repr(value)}")
    role = fields["role"]
    if role not in ROLES:
        raise ValueError(
            f"{place}: the role of {key} must be one of {list(ROLES)}, got {short_repr(role)}"
        )
    if calls and role != "assistant":
        raise ValueError(f"{place}: {key} has tool_calls, which only the assistant can, got {role}")
    fields["content"] = read_content(fields, f"{place}: {key}")
    if fields.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{place}: the weight of {key} must be 1, to learn it, or 0, only to read it, got "
            f"{short_repr(fields['weight'])}"
        )
    if calls:
        fields["tool_calls"] = calls
    # Half a surrogate pair may be anywhere, and dates of a table.
    read_string({key: json.dumps(fields, ensure_ascii=False, default=str)}, key, place)
    return fields


def from_sharegpt(fields: dict[str, Any]) -> dict[str, Any]:
    role, value = fields.pop("from"), fields.pop("value")
    name = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role == "function_call":
        return {**fields, "role": name, "tool_calls": value}
    return {**fields, "role": name, "content": value}


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of tools, or of one, in the form that templates read.

    Each may be the function alone; the arguments, and all of it, may be JSON texts.
    """
    return [read_call(call, place) for call in read_list(value, "tool_calls", place)]


def read_call(call: Any, place: str) -> dict[str, Any]:
    outer = call if isinstance(call, dict) and "function" in call else {"function": call}
    function = outer["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{place}: each of tool_calls must be {{'function': {{'name': ..., 'arguments': "
            f"{{...}}}}}}, got {short_repr(call)}"
        )
    arguments = parse_json(function.get("arguments") or {}, "arguments", place)
    if not isinstance(arguments, dict):
        raise NotRendered(
            f"{place}: the arguments of a call must be an object, got {short_repr(arguments)}"
        )
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def read_tools(row: Row, place: str) -> list[dict[str, Any]]:
    """The functions that a row lets the assistant call, {"type": "function", "function": schema}.

    Raises:
        ValueError: they are no schemas.
    """
    tools = read_list(row.get("tools"), "tools", place)
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool_name(tool), str):
            raise ValueError(
                f"{place}: tools must be a list of schemas of functions, {{'type': 'function', "
                f"'function': {{'name': ..., 'parameters': {{...}}}}}}, got {short_repr(tool)}"
            )
    return [x if "function" in x else {"type": "function", "function": x} for x in tools]


def tool_name(tool: dict[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def read_list(value: Any, key: str, place: str) -> list:
    """A list, or one item of it, or the JSON text of either; what is empty is no item."""
    value = parse_json(value or [], key, place)
    return [item for item in (value if isinstance(value, list) else [value]) if item]


def parse_json(value: Any, key: str, place: str) -> Any:
    """A value, or what the JSON text in its place holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise NotRendered(
            f"{place}: {key} must be JSON where they are a text, got {short_repr(value)}"
        ) from error


def read_content(fields: dict[str, Any], place: str) -> str:
    """The text of a message, whose content may be a list of parts {"type": "text", "text": ...}."""
    if not isinstance(fields["content"], list):
        return read_string(fields, "content", place)
    for part in fields["content"]:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError(
                f"{place}: the parts of a content must be {{'type': 'text', 'text': ...}}, got "
                f"{short_repr(fields['content'])}"
            )
    return "".join(read_string(part, "text", place) for part in fields["content"])


def written_texts(message: Message, *, reasoning: bool) -> list[tuple[str, set[str]]]:
    """(key, the forms that one of its texts may take) of what a template has to write of a message.

    The names and arguments of calls are texts, too; a tool's answer may be written as JSON. With
    `reasoning` a text is what the assistant thought, which many templates leave out of former
    turns.
    """
    content = message["content"]
    forms = json_forms(content) if message["role"] == "tool" else {content}
    texts = [("content", forms)] if content.strip() else []
    thoughts = [(key, message.get(key)) for key in REASONING if reasoning]
    thoughts = [(key, {x}) for key, x in thoughts if isinstance(x, str) and x.strip()]
    texts += thoughts[:1]
    for call in message.get("tool_calls", []):
        function = call["function"]
        leaves = [function["name"], *json_leaves(function["arguments"])]
        texts += [("tool_calls", json_forms(leaf)) for leaf in leaves]
    return texts


def json_leaves(value: Any) -> list[Any]:
    """The keys and values in nested lists and objects."""
    if isinstance(value, dict):
        return [*value, *json_leaves(list(value.values()))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in json_leaves(item)]
    return [value]


def json_forms(leaf: Any) -> set[str]:
    """What a template may write for a text or number: itself or JSON, with escapes or without."""
    if not isinstance(leaf, str):
        return {str(leaf), json.dumps(leaf)}
    texts = (json.dumps(leaf, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
    return {leaf, *texts}


def as_messages(value: Any, key: str, role: str, place: str) -> tuple[Message, ...]:
    """A list of messages; a text is one message of the role."""
    if isinstance(value, str):
        return ({"role": role, "content": read_string({key: value}, key, place)},)
    if not isinstance(value, list):
        raise ValueError(
            f"{place}: {key} must be a string or a list of messages, got {short_repr(value)}"
        )
    return read_messages(value, key, place)


def assistant_turns(messages: Sequence[Message], place: str) -> list[int]:
    """Which of the messages are the assistant's.

    Raises:
        NotRendered: one of them has nothing to respond to.
    """
    roles = ["assistant", *(message["role"] for message in messages)]
    for i, (before, role) in enumerate(itertools.pairwise(roles)):
        if before == role == "assistant":
            raise NotRendered(
                f"{place}: a turn of the assistant's must follow one of another role, message {i} "
                "(counted from 0) does not"
            )
    return [i for i, role in enumerate(roles[1:]) if role == "assistant"]


def is_learned(message: Message) -> bool:
    """Whether it is a turn of the assistant's without a weight of 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def has_blank_turn(messages: Sequence[Message]) -> bool:
    """Whether the assistant says nothing in one of its turns, and calls no tool."""
    turns = (m for m in messages if m["role"] == "assistant")
    return any(not m["content"].strip() and "tool_calls" not in m for m in turns)


def collect(
    rows: Iterable[tuple[str, dict]],
    parse: Callable[[dict, str], Any],
    left_out: list[str] | None,
) -> list:
    """What `parse(row, place)` makes of rows. Of a row that is not rendered the reason goes into
    `left_out`; where that is None, it is raised.

    Raises:
        NotRendered: no row is left.
    """
    records = []
    for place, row in rows:
        try:
            records.append(parse(row, place))
        except NotRendered as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    if left_out and not records:
        raise NotRendered(f"none of the {len(left_out):,} rows is rendered; {left_out[0]}")
    return records


def count_left_out(left_out: Sequence[str]) -> dict[str, int]:
    """{reason: number of rows}, the reason of the first one for all of them."""
    return {f"not rendered (the first: {left_out[0]})": len(left_out)} if left_out else {}
