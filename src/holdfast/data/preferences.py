"""Rows of the kinds of tasks that TRL trains, to examples: preferences, and prompts whose answers are rewarded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, Kind, Turn
from holdfast.data.conversation import BadRowError, Noticed, conversation, field_value, text_field, tools_of
from holdfast.data.files import type_name, where
from holdfast.data.formats import LEFT_OUT
from holdfast.data.row_pictures import shows_pictures
from holdfast.errors import DataError

USED: dict[str, set[str]] = {
    "dpo": {"prompt", "chosen", "rejected", "tools"},
    "kto": {"prompt", "completion", "label", "tools"},
}
"""The columns that rows of a kind have; of grpo all of them, which its reward is given."""

PLACE = "?"
"""What stands in the place of the answer of a row that has none."""


def kind_examples(
    rows: Iterable[dict[str, Any]],
    kind: Kind,
    *,
    file: str | Path,
    needs_answer: bool = False,
    bad: list[str] | None = None,
    noticed: Noticed | None = None,
) -> list[Example]:
    """Turn rows in TRL's formats into examples, each a conversation.

    - dpo: ``{prompt, chosen, rejected}``. The answer is the chosen one, and ``choices`` are both, the chosen one first.
    - kto: ``{prompt, completion, label}``. ``good`` is the label.
    - grpo: ``{prompt, ...}``. ``columns`` are all of them; the answer is that of the column ``answer``, if it is there.

    A prompt is a text or a list of messages, an answer a text or a list of one message. Without a prompt, ``chosen``
    and ``rejected`` are conversations that differ in their last message.

    Args:
        needs_answer: whether rows of grpo must have an answer.
        bad: what is wrong with rows that cannot be used is added to it, and they are left out. None: the first raises.
        noticed: what is noticed of the rows is noted in it.

    Raises:
        DataError: a row cannot be used; the message names file, row and reason.
    """
    examples = []
    for position, row in enumerate(rows):
        index = getattr(row, "index", position)
        place = Example(file=str(file), row=index)
        try:
            if shown := shows_pictures(row):
                raise BadRowError(
                    f"{shown}: preferences and rewards are trained on text alone; {LEFT_OUT.format(column=shown)}"
                )
            match kind:
                case "dpo":
                    examples.append(_pair(row, place))
                case "kto":
                    examples.append(_judged(row, place))
                case "grpo":
                    examples.append(_rewarded(row, place, needs_answer))
        except BadRowError as error:
            message = f"{where(file, index, row)}: {error}"
            if bad is None:
                raise DataError(message) from None
            bad.append(message)
        if noticed is not None and kind in USED:
            noticed.unused |= {name for name, value in row.items() if name not in USED[kind] and value is not None}
    return examples


def paired(examples: Sequence[Example]) -> list[Example]:
    """Pairs of a good and a bad answer to the same prompt: the first of each with the first, and so on."""
    good: dict[Any, list[Example]] = {}
    bad: dict[Any, list[Example]] = {}
    for example in examples:
        side = good if example.good else bad
        side.setdefault((example.turns[:-1], example.tools), []).append(example)
    return [
        replace(one, choices=(one.answer, other.answer), good=None)
        for prompt, ones in good.items()
        for one, other in zip(ones, bad.get(prompt, ()), strict=False)
    ]


def _pair(row: dict[str, Any], place: Example) -> Example:
    row = row if row.get("prompt") is not None else _with_prompt(row)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen.said == rejected.said:
        raise BadRowError("chosen and rejected are the same answer, so neither is preferred")
    turns = (*_prompt(row), chosen)
    return replace(place, turns=turns, choices=(chosen.said, rejected.said), tools=tools_of(row))


def _judged(row: dict[str, Any], place: Example) -> Example:
    label = field_value(row, "label")
    if not isinstance(label, bool):
        raise BadRowError(f"label: must be true (a good answer) or false, not {type_name(label)} ({label!r:.40})")
    return replace(place, turns=(*_prompt(row), _answer(row, "completion")), good=label, tools=tools_of(row))


def _rewarded(row: dict[str, Any], place: Example, needs_answer: bool) -> Example:
    prompt = _prompt(row)
    if row.get("answer") is None and needs_answer:
        raise BadRowError("answer: is missing or null; reward exact_match compares with it")
    answered = isinstance(row.get("answer"), str) and (needs_answer or bool(row["answer"].strip()))
    answer = Turn("assistant", text_field(row, "answer").strip() if answered or needs_answer else PLACE)
    return replace(place, turns=(*prompt, answer), columns=dict(row), answered=answered, tools=tools_of(row))


def _prompt(row: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns before the answer; earlier answers among them are not trained."""
    value = field_value(row, "prompt")
    if not isinstance(value, list):
        text = text_field(row, "prompt")
        return (Turn("user", text, (0, len(text))),)
    turns = conversation([*value, {"role": "assistant", "content": PLACE}], "prompt")[:-1]
    if turns[-1].role == "assistant":
        raise BadRowError("prompt: ends with an answer; it must end with what is asked")
    return tuple(replace(turn, trained=False) if turn.role == "assistant" else turn for turn in turns)


def _answer(row: dict[str, Any], key: str) -> Turn:
    value = field_value(row, key)
    if not isinstance(value, list):
        return Turn("assistant", text_field(row, key).strip())
    turns = conversation([{"role": "user", "content": PLACE}, *value], key)[1:]
    if len(turns) != 1 or len(value) != 1:
        raise BadRowError(f"{key}: must be one message of the assistant, not {len(value)} messages")
    return turns[0]


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose answers are whole conversations, as one with a prompt."""
    chosen, rejected = field_value(row, "chosen"), field_value(row, "rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadRowError("prompt: is missing or null; only whole conversations as chosen and rejected need none")
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise BadRowError("prompt: is missing, and chosen and rejected do not share all messages but their last")
    return row | {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
