"""Conversations as datasets of today have them: roles, parts, reasoning, calls of tools, marks of what is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from holdfast.api.task import Turn
from holdfast.data.conversation import BadRowError, Noticed, conversation, tools_of

ASKED = {"role": "user", "content": "How warm is it?"}
CALL = {"name": "weather", "arguments": {"place": "Kiel"}}
CALLED = Turn("assistant", "", calls=(json.dumps(CALL),))


def turns(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return conversation(list(messages), "messages")


def last(**message: Any) -> Turn:
    return turns(ASKED, {"role": "assistant", **message})[-1]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}],
        [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}],
        [{"human": "a", "assistant": "b"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": ["b"]}],
        [
            {"role": "user", "content": [{"type": "text", "value": "a"}]},
            {"role": "assistant", "content": "b", "weight": 1},
        ],
    ],
)
def test_one_conversation_in_the_ways_of_many_tools(messages: list[dict[str, Any]]) -> None:
    assert conversation(messages, "x") == (Turn("user", "a", (0, 1)), Turn("assistant", "b"))


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
        {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": '{"place": "Kiel"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"content": None, "function_call": CALL},
        {"content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
    ],
)
def test_one_call_in_the_ways_of_many_tools(message: dict[str, Any]) -> None:
    assert last(**message) == CALLED
    assert last(**message).said == json.dumps(CALL)


def test_calls_and_answers_of_tools_as_sharegpt_has_them() -> None:
    rows = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"celsius": 3}'},
        {"from": "gpt", "value": "3 degrees"},
    ]
    _, called, told, answer = conversation(rows, "conversations")
    assert called == CALLED and answer.content == "3 degrees"
    assert (told.role, told.content) == ("tool", '{"celsius": 3}')


@pytest.mark.parametrize(
    "message",
    [
        {"content": "4", "reasoning_content": "2 and 2"},
        {"content": "4", "thinking": "2 and 2"},
        {"content": "<think>\n2 and 2\n</think>\n\n4"},
        {"content": [{"type": "reasoning", "value": "2 and 2"}, {"type": "text", "value": "4"}]},
    ],
)
def test_one_reasoning_in_the_ways_of_many_tools(message: dict[str, Any]) -> None:
    assert last(**message) == Turn("assistant", "4", reasoning="2 and 2")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_an_answer_that_is_not_to_be_trained_is_kept_as_such(mark: dict[str, Any]) -> None:
    bad, good = {"role": "assistant", "content": "BAD"}, {"role": "assistant", "content": "good"}
    assert [turn.trained for turn in turns(ASKED, bad | mark, ASKED, good)] == [True, False, True, True]
    with pytest.raises(BadRowError, match="no answer is to be trained"):
        turns(ASKED, bad | mark)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "a", "weight": 0.5}, "turn 2: weight: must be 0 or 1"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "turn 2: content, part 1: is of type 'image_url'"),
        ({"content": [7]}, "turn 2: content, part 1: must be an object with type and text, not a number"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "turn 2: tool_calls: a call must be an object with name"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "turn 2: tool_calls: arguments: is not valid JSON"),
        ({"content": [{"type": "reasoning", "value": "hm"}]}, "turn 2: content: is empty"),
    ],
)
def test_what_cannot_be_used_is_refused(message: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRowError) as error:
        last(**message)
    assert said in str(error.value)


def test_only_answers_reason_call_and_are_trained() -> None:
    answer = {"role": "assistant", "content": "a"}
    for key, value in (("tool_calls", [CALL]), ("train", True)):
        with pytest.raises(BadRowError, match="only a"):
            turns(ASKED | {key: value}, answer)
    assert turns(ASKED | {"weight": 1}, answer) == turns(ASKED | {"weight": 0}, answer) == turns(ASKED, answer)


def test_keys_that_are_not_used_are_named() -> None:
    noticed = Noticed()
    answer = {"role": "assistant", "content": "a", "score": 2, "note": None}
    conversation([ASKED | {"id": 3}, answer], "messages", noticed)
    assert noticed.unused == {"messages: id", "messages: score"}


def test_a_conversation_ends_with_its_last_answer() -> None:
    noticed = Noticed()
    found = conversation([ASKED, {"role": "assistant", "content": "a"}, ASKED], "messages", noticed)
    assert [turn.role for turn in found] == ["user", "assistant"] and noticed.trailing == 1


def test_tools_are_given_as_chat_templates_read_them() -> None:
    tool = {"name": "weather", "parameters": {}}
    wrapped = [{"type": "function", "function": tool}]
    for given in ([tool], wrapped, json.dumps([tool])):
        assert json.loads(tools_of({"tools": given}) or "") == wrapped
    assert tools_of({}) is tools_of({"tools": "[]"}) is tools_of({"tools": None}) is None
    for bad in ("[{}]", "{}]", [3], {"name": "f"}):
        with pytest.raises(BadRowError, match="tools"):
            tools_of({"tools": bad})
