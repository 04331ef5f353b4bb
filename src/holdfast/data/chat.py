"""A tokenizer's chat template: a conversation to pieces of text, with proof that nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from holdfast.api.task import PICTURE, Example, Turn
from holdfast.data.conversation import tool_names
from holdfast.data.files import where
from holdfast.data.pieces import Piece, answer_piece
from holdfast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DAY = datetime(2024, 7, 26)
"""The day that templates are shown: what Llama's say where none is given. Today would make rows depend on their day."""

DATE = DAY.strftime("%d %b %Y")

_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

logger = logging.getLogger("holdfast")


class TemplateBrokenError(Exception):
    """The reason why a chat template cannot be used for a row."""


class _NotShownError(TemplateBrokenError):
    """Of something that the plain template cannot show either."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **options: Any,
) -> str:
    """The text of messages in a tokenizer's chat template, on :data:`DAY` whatever the day."""
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=_template(tokenizer, tools),
        tokenize=False,
        date_string=DATE,
        **options,
    )


class ChatTemplate:
    """Renders conversations by a tokenizer's chat template.

    What a template marks by ``{% generation %}`` is what is supervised of an answer; without marks it is all that the
    template writes for an answer, its reasoning and its end included.

    Attributes:
        told: the warnings that were given so far, by what each is about.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.told: dict[str, str] = {}

    def pieces(self, example: Example) -> list[list[Piece]]:
        """The pieces of an example's sequences; each begins with what stands before an answer.

        Where the template rewrites earlier turns as the conversation goes on (it removes earlier reasoning, say), each
        answer gets a sequence of its own. Where it knows no system turn, or not in its place, the text stands in the
        question that follows.

        Raises:
            DataError: the template cannot render the row, leaves out something of it, or rewrites an answer.
        """
        from jinja2 import TemplateError

        self._tell_of_special(example)
        first: Exception | None = None
        for as_parts, number, turns in _attempts(example.turns):
            try:
                found = self._sequences(example, turns, as_parts)
            except (TemplateError, TemplateBrokenError, TypeError) as error:
                first = first or error
                continue
            if number and turns[0].role != "system" and "system" not in self.told:
                self.tell(
                    "system",
                    f"{where(example.file, example.row)}: the chat template has no place for a system turn here; its "
                    "text stands in the question that follows, here and wherever else that is so",
                )
            return found
        advice = "" if isinstance(first, _NotShownError) else "; data.template=plain does without it"
        raise DataError(
            f"{where(example.file, example.row)}: the tokenizer's chat template cannot be used: {first}{advice}"
        )

    def tell(self, what: str, warning: str) -> None:
        """Warn of something, unless it was told before."""
        if what not in self.told:
            self.told[what] = warning
            logger.warning("%s", warning)

    def _tell_of_special(self, example: Example) -> None:
        """Warn once of a text that holds a special token, which becomes a control token among the template's own."""
        if "special" in self.told:
            return
        found = self.special_token(example)
        if found is not None:
            self.tell(
                "special",
                f"{where(example.file, example.row)}: {found!r} in a text becomes a control token, as the chat "
                "template's own do; if a template has rendered these rows already, give the messages instead; "
                "data.template=plain keeps it text",
            )

    def special_token(self, example: Example) -> str | None:
        """The first special token that the text of an example spells."""
        texts = [example.text] if example.text is not None else [turn.content for turn in example.turns]
        return next((found[0] for text in texts if (found := self._special_pattern.search(text))), None)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special)) or "(?!)")

    def answer(self, response: str) -> str:
        """What a response says: without the reasoning before it, special tokens, and white space around it."""
        before, end, after = response.partition(self._reasoning_end)
        return self._special_pattern.sub("", after if end else before).strip()

    @cached_property
    def _special(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def _reasoning_end(self) -> str:
        """What the template writes between reasoning and the answer after it, or before any answer, as gpt-oss's."""
        from jinja2 import TemplateError

        before = {}
        for reasoning in (None, "reasoning"):
            turns = (Turn("user", "question"), Turn("assistant", "saying", reasoning=reasoning))
            for as_parts in (False, True):
                messages = [_message(turn, as_parts) for turn in turns]
                with contextlib.suppress(TemplateError, TypeError):
                    asked, _ = self._rendered(Example("", 0, turns), messages[:1], True, add_generation_prompt=True)
                    text, _ = self._rendered(Example("", 0, turns), messages, True, add_generation_prompt=False)
                    if "question" in text:
                        before[reasoning] = text.removeprefix(asked).rpartition("saying")[0]
                        break
        plain, between = before.get(None, "").strip(), before.get("reasoning", "").rpartition("reasoning")[2].strip()
        if plain and between.endswith(plain):
            return plain
        return between if between and "question" not in between else "</think>"

    def _check_answer(self, answer: str, turn: Turn) -> None:
        """An answer, as it will be read in a response, begins with its content, and names the tools that it calls."""
        if turn.reasoning and turn.reasoning.strip() not in answer:
            raise _NotShownError(
                f"it does not show the reasoning of an answer ({turn.reasoning.strip()[:40]!r}); data.reasoning=drop "
                "leaves it out of every row"
            )
        for call in turn.calls:
            if json.loads(call)["name"] not in answer:
                raise _NotShownError(f"it does not show the call {call[:60]!r} of an answer")
        if not turn.calls and not self.answer(answer).startswith(self._special_pattern.sub("", turn.content).strip()):
            raise TemplateBrokenError(f"the answer {turn.content[:40]!r} becomes {answer[:80]!r}")

    def _sequences(self, example: Example, turns: Sequence[Turn], as_parts: bool) -> list[list[Piece]]:
        thinks = any(turn.reasoning for turn in turns)
        sequences: list[list[Piece]] = []
        done = None
        for end, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            messages = [_message(turn, as_parts) for turn in turns[: end + 1]]
            before, _ = self._rendered(example, messages[:end], thinks, add_generation_prompt=True)
            after, marks = self._rendered(example, messages, thinks, add_generation_prompt=False)
            if not after.startswith(before):
                raise TemplateBrokenError(f"an answer changes what stands before it: {_difference(before, after)}")
            _check_before(before, turns[:end])
            if example.tools is not None and not sequences:
                alone, _ = self._rendered(
                    replace(example, tools=None), messages[:end], thinks, add_generation_prompt=True
                )
                _check_tools(before, alone, example.tools)
            answer = after.removeprefix(before)
            self._check_answer(answer, turn)
            parts = list(_answer_pieces(after, len(before), marks, turn))
            if done is not None and before.startswith(done):
                sequences[-1] += [Piece(before[len(done) :]), *parts]
            else:
                sequences.append([Piece(before), *parts])
            done = after
        return sequences

    def _rendered(
        self, example: Example, messages: list[dict[str, Any]], thinks: bool, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text of some turns, and the spans that the template marks as generated, if it marks any."""
        tools = None if example.tools is None else json.loads(example.tools)
        template = _template(self.tokenizer, tools)
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinks}
        if add_generation_prompt or not _marks(template):
            return render(self.tokenizer, messages, tools, **options), None
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], [marks] = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            date_string=DATE,
            **options,
            **self.tokenizer.special_tokens_map,
        )
        return text, [tuple(mark) for mark in marks]


def _template(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None) -> str:
    """The template that applies, with :data:`DAY` in the place of the day on which it is rendered."""
    return _on_day(tokenizer.get_chat_template(None, tools))


@lru_cache(maxsize=32)
def _on_day(template: str) -> str:
    return _TODAY.sub(lambda today: repr(DAY.strftime(today["format"])), template)


@lru_cache(maxsize=32)
def _marks(template: str) -> bool:
    """Whether a template marks what is generated."""
    return _MARKED.search(template) is not None


def _message(turn: Turn, as_parts: bool) -> dict[str, Any]:
    """A turn as templates of text models read it; as parts: as those of models that see, and old ones that call, do."""
    content = _parts(turn) if turn.pictures or (as_parts and not turn.calls) else turn.content
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.reasoning:
        message |= {"reasoning_content": turn.reasoning, "thinking": turn.reasoning}
    if turn.calls:
        functions = [json.loads(call) for call in turn.calls]
        if as_parts:
            functions = [function | {"arguments": json.dumps(function["arguments"])} for function in functions]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    if turn.name:
        message["name"] = turn.name
    return message


def _parts(turn: Turn) -> list[dict[str, str]]:
    """The parts of a turn: its text, and a place for each of its pictures."""
    first, *rest = turn.content.split(PICTURE)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for text in rest:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts


def _attempts(turns: Sequence[Turn]) -> Iterator[tuple[bool, int, Sequence[Turn]]]:
    """Ways to write the turns, the plainest first: whether as parts, which way of system turns, and the turns."""
    for as_parts in (False, True):
        for number, written in enumerate(_system_turns(turns)):
            yield as_parts, number, written


def _system_turns(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The turns as they are; with one system turn of all that stand first; and with none."""
    yield turns
    if all(turn.role != "system" for turn in turns):
        return
    leading = next(n for n, turn in enumerate(turns) if turn.role != "system")
    if leading > 1:
        yield [Turn("system", _joined(turns[:leading])), *turns[leading:]]
    if any(turn.role == "system" for turn in turns[leading:]) and leading:
        yield [Turn("system", _joined(turns[:leading])), *_without_system(turns[leading:])]
    yield _without_system(turns)


def _joined(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns)


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """Put a system's text before the question that follows it, or behind the turn before it where none follows."""
    found: list[Turn] = []
    waiting = ""
    for number, turn in enumerate(turns):
        if turn.role != "system":
            if waiting:
                shift = len(waiting)
                cut = None if turn.cut is None else (turn.cut[0] + shift, turn.cut[1] + shift)
                found.append(replace(turn, content=waiting + turn.content, cut=cut))
                waiting = ""
            else:
                found.append(turn)
        elif next((later.role for later in turns[number:] if later.role != "system"), None) == "user":
            follows = turns[number + 1].role == "system"
            waiting += turn.content + ("\n" if follows else "\n\n")
        elif found and found[-1].role != "assistant":
            found[-1] = replace(found[-1], content=f"{found[-1].content}\n\n{turn.content}")
        else:
            raise TemplateBrokenError(f"there is no question near the system turn {turn.content[:40]!r}")
    return found


def _check_before(before: str, turns: Sequence[Turn]) -> None:
    """What is asked stands in the text, whatever the template does with earlier answers."""
    for number, turn in enumerate(turns, 1):
        for said in map(str.strip, turn.content.split(PICTURE)):
            if turn.role == "assistant" or said in before or json.dumps(said, ensure_ascii=False)[1:-1] in before:
                continue
            if json.dumps(said)[1:-1] not in before and not _equal_json(said, before):
                raise TemplateBrokenError(f"it leaves out turn {number} ({turn.role}): {said[:60]!r}")


def _check_tools(before: str, alone: str, tools: str) -> None:
    """The tools stand in the text, and are what makes it another than it is without them."""
    for name in tool_names(tools):
        if name not in before or before == alone:
            raise _NotShownError(
                f"it does not show the tools of the row, such as {name!r}; columns: {{tools: null}} leaves them out"
            )


def _equal_json(said: str, before: str) -> bool:
    """Whether a tool's answer stands in the text as JSON in other words: with its names and values."""
    try:
        value = json.loads(said)
    except ValueError:
        return False
    return all(word in before for word in re.findall(r"\w+", json.dumps(value, ensure_ascii=False)))


def _answer_pieces(text: str, start: int, marks: list[tuple[int, int]] | None, turn: Turn) -> Iterator[Piece]:
    """The pieces of what stands from ``start`` on: all of it supervised, or what is marked."""
    if marks is None:
        yield answer_piece(text[start:], turn)
        return
    for first, last in marks:
        if last <= start:
            continue
        if first > start:
            yield answer_piece(text[start:first], turn, supervised=False)
        yield answer_piece(text[max(start, first) : last], turn)
        start = last
    if start < len(text):
        yield answer_piece(text[start:], turn, supervised=False)


def _difference(before: str, after: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(after))
    return f"{before[at : at + 40]!r} becomes {after[at : at + 40]!r}"
