"""A row's conversation to turns: the roles, keys and kinds of content that datasets of today use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.api.task import Turn
from holdfast.data.files import half_character, shown_name, type_name
from holdfast.errors import did_you_mean

Role = Literal["system", "user", "assistant", "tool", "call"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
"""What a turn's speaker is called, and who it is; a call is a turn of the assistant's that calls tools."""

SHAREGPT = ("conversations",)
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TRAINED_KEYS = ("weight", "train", "training")
CALL_KEYS = ("tool_calls", "function_call")
USED_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *TRAINED_KEYS, *CALL_KEYS, "type", "name", "tool_call_id"}
"""Keys of a turn that mean something here, or say only what its place says too."""

_REASONED = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class BadRowError(Exception):
    """The reason why a row cannot be used."""


def field_value(row: dict[str, Any], key: str, within: str = "") -> Any:
    """A value of a row.

    Raises:
        BadRowError: it is missing or null.
    """
    name = f"{within}: {key}" if within else key
    if key not in row:
        raise BadRowError(f"{name}: is missing; found: {', '.join(map(repr, row)) or 'nothing'}")
    if row[key] is None:
        raise BadRowError(f"{name}: is null")
    return row[key]


def text_field(row: dict[str, Any], key: str, within: str = "", may_be_empty: bool = False) -> str:
    """A text of a row.

    Raises:
        BadRowError: it is missing or null, is no text, is empty where it must not be, or holds half a character.
    """
    name = f"{within}: {key}" if within else key
    value = field_value(row, key, within)
    if not isinstance(value, str):
        raise BadRowError(f"{name}: must be text, not {type_name(value)} ({value!r:.40})")
    if not may_be_empty and not value.strip():
        raise BadRowError(f"{name}: is empty")
    if (wrong := half_character(value)) is not None:
        raise BadRowError(f"{name}: {wrong}")
    return value


@dataclass
class Noticed:
    """What was noticed of rows while they were read.

    Attributes:
        unused: columns, and keys of turns, that are not used.
        bad_answers: rows that are left out, as their label says that their answer is bad.
        trailing: conversations that go on after their last answer, and are cut there.
    """

    unused: set[str] = field(default_factory=set)
    bad_answers: int = 0
    trailing: int = 0

    def notes(self) -> list[str]:
        """What is said about it."""
        notes = []
        if self.unused:
            notes.append(f"columns that are not used: {', '.join(map(shown_name, sorted(self.unused)))}")
        if self.bad_answers:
            notes.append(f"{self.bad_answers} rows are left out, as their label says that the answer is bad")
        if self.trailing:
            notes.append(f"{self.trailing} conversations go on after their last answer, and end there now")
        return notes


def conversation(messages: Any, key: str, noticed: Noticed | None = None) -> tuple[Turn, ...]:
    """The turns of a conversation, to its last answer; it begins with a question, after what the system says.

    Args:
        messages: objects of a role (``role`` or ``from``) and a content (``content`` or ``value``: text, or parts of
            text), or pairs of what ``human`` and ``assistant`` say.
        key: the column that they stand in, for messages about it.
        noticed: keys of turns that are not used, and turns after the last answer, are noted in it.

    Raises:
        BadRowError: a turn cannot be used.
    """
    if not isinstance(messages, list):
        raise BadRowError(f"{key}: must be a list of turns, not {type_name(messages)}")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        within = f"{key}, turn {number}"
        if not isinstance(message, dict):
            raise BadRowError(f"{within}: must be an object with role and content, not {type_name(message)}")
        for one in _single(message):
            if noticed is not None:
                noticed.unused |= {f"{key}: {name}" for name in one if name not in USED_KEYS and one[name] is not None}
            turn = _turn(one, within)
            if turn.role != "system" or turn.content.strip():
                turns.append(turn)
    end = max((number for number, turn in enumerate(turns, 1) if turn.role == "assistant"), default=0)
    if noticed is not None and end < len(turns):
        noticed.trailing += 1
    turns = turns[:end]
    if not turns:
        raise BadRowError(f"{key}: must end with an answer ({'from gpt' if key in SHAREGPT else 'role assistant'})")
    if next(turn.role for turn in turns if turn.role != "system") != "user":
        raise BadRowError(f"{key}: must begin with a question ({'from human' if key in SHAREGPT else 'role user'})")
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise BadRowError(f"{key}: no answer is to be trained (weight, train); leave the row out")
    return tuple(turns)


def _single(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message itself, or the two of a pair."""
    if "human" in message and "assistant" in message and not any(key in message for key in ROLE_KEYS):
        yield {"role": "user", "content": message["human"]}
        yield {"role": "assistant", "content": message["assistant"]}
    else:
        yield message


def _turn(message: dict[str, Any], within: str) -> Turn:
    role_key = next((key for key in ROLE_KEYS if key in message), ROLE_KEYS[0])
    named = text_field(message, role_key, within)
    role = ROLES.get(named)
    if role is None:
        raise BadRowError(f"{within}: unknown {role_key} {named!r}{did_you_mean(named, ROLES)}")
    content_key = next((key for key in CONTENT_KEYS if key in message), CONTENT_KEYS[0])
    text, reasoning, calls = _content(message, content_key, within)
    calls += [call for key in CALL_KEYS for call in _calls(message.get(key), f"{within}: {key}")]
    trained = _trained(message, role, within)
    if role == "call":
        text, reasoning = _split_reasoning(text, reasoning)
        calls, text, role = calls + _calls(text, f"{within}: {content_key}"), "", "assistant"
    if role == "assistant":
        reasoning = next((text_field(message, key, within) for key in REASONING_KEYS if message.get(key)), reasoning)
        text, reasoning = _split_reasoning(text, reasoning)
    elif calls or reasoning:
        raise BadRowError(f"{within}: only an answer reasons and calls tools, not {role_key} {named!r}")
    if role in ("user", "assistant") and not calls and not text.strip():
        raise BadRowError(f"{within}: {content_key}: is empty")
    match role:
        case "assistant":
            return Turn("assistant", text.strip(), trained=trained, reasoning=reasoning, calls=tuple(calls))
        case "user":
            return Turn("user", text, (0, len(text)))
        case "tool":
            name = message.get("name")
            return Turn("tool", text, (0, len(text)), name=name if isinstance(name, str) else None)
    return Turn("system", text)


def _content(message: dict[str, Any], key: str, within: str) -> tuple[str, str | None, list[str]]:
    """A message's text, its reasoning and its calls of tools."""
    value = message.get(key)
    if value is None and any(message.get(call) for call in CALL_KEYS):
        return "", None, []
    if not isinstance(value, list):
        return text_field(message, key, within, may_be_empty=True), None, []
    texts, reasoning, calls = [], [], list[str]()
    for number, part in enumerate(value, 1):
        place = f"{within}: {key}, part {number}"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRowError(f"{place}: must be an object with type and text, not {type_name(part)}")
        kind = part.get("type", "text")
        said = next((name for name in ("text", "value", "thinking", "reasoning") if name in part), "text")
        match kind:
            case "text" | "input_text" | "output_text":
                texts.append(text_field(part, said, place, may_be_empty=True))
            case "reasoning" | "thinking":
                reasoning.append(text_field(part, said, place, may_be_empty=True))
            case "tool_call" | "function_call":
                calls += _calls(part.get(said, part), place)
            case _:
                raise BadRowError(f"{place}: is of type {kind!r}; of the kinds of content only text can be trained")
    return "".join(texts), "\n".join(reasoning) or None, calls


def _split_reasoning(text: str, reasoning: str | None) -> tuple[str, str | None]:
    """Take the trace that an answer begins with out of its text."""
    found = _REASONED.match(text)
    if found is None or reasoning is not None:
        return text, reasoning
    return text[found.end() :], found[1].strip() or None


def _trained(message: dict[str, Any], role: Role, within: str) -> bool:
    """Whether a turn's own mark, if it has one, lets it be trained."""
    for key in TRAINED_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # True is 1
            raise BadRowError(f"{within}: {key}: must be 0 or 1 (not trained, trained), not {value!r:.40}")
        if value and role not in ("assistant", "call"):
            if key == "weight":
                continue  # as of every turn, by habit
            raise BadRowError(f"{within}: {key}: only answers are trained, not what stands before them")
        return bool(value)
    return True


def _calls(value: Any, within: str) -> list[str]:
    """Calls of tools, each as the JSON of its name and arguments."""
    if value is None:
        return []
    value = parsed(value, within)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{within}: a call must be an object with name and arguments, not {call!r:.60}")
        arguments = parsed(function.get("arguments") or {}, f"{within}: arguments")
        calls.append(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False))
    return calls


def tools_of(row: dict[str, Any]) -> str | None:
    """The tools that a row's ``tools`` offer, as the JSON of a list in the form that chat templates read.

    Raises:
        BadRowError: they are no list of objects with names.
    """
    value = row.get("tools")
    value = parsed(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRowError(f"tools: must be a list of tools, not {type_name(value)}")
    tools = []
    for number, tool in enumerate(value, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"tools: tool {number} must be an object with a name, not {tool!r:.60}")
        tools.append({"type": "function", "function": function})
    return json.dumps(tools, ensure_ascii=False)


def tool_names(tools: str) -> list[str]:
    """The names of the tools in what :func:`tools_of` gave."""
    return [tool["function"]["name"] for tool in json.loads(tools)]


def parsed(value: Any, within: str) -> Any:
    """A value that may be given as the text of its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRowError(f"{within}: is not valid JSON: {value[:60]!r}") from None
