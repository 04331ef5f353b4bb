"""Rows to examples: which shapes a row of a task may have, and what is said about a row that has none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.api.task import Example, Turn
from holdfast.config.pattern import group_span
from holdfast.data.conversation import BadRowError, Noticed, conversation, field_value, text_field, tools_of
from holdfast.data.files import type_name, where
from holdfast.data.row_pictures import COLUMNS, take_pictures, with_pictures
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.system.files import json_text

Format = Literal["messages", "sharegpt", "prompt_answer", "sentence_label", "alpaca", "text"]

# The keys that tell a format, in the order in which `detect` looks; alpaca's `input` may be absent.
KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_answer": ("prompt", "answer"),
    "sentence_label": ("sentence", "label"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}

OTHER_NAMES: tuple[tuple[Format, dict[str, str]], ...] = (
    ("sharegpt", {"conversation": "conversations"}),
    ("alpaca", {"instruction": "instruction", "response": "output", "context": "input"}),
    ("prompt_answer", {"prompt": "prompt", "completion": "answer"}),
    ("prompt_answer", {"prompt": "prompt", "response": "answer"}),
    ("prompt_answer", {"question": "prompt", "answer": "answer"}),
    ("prompt_answer", {"question": "prompt", "response": "answer"}),
    ("prompt_answer", {"query": "prompt", "response": "answer"}),
    ("prompt_answer", {"input": "prompt", "output": "answer"}),
    ("text", {"response": "text"}),
    ("text", {"content": "text"}),
)
"""What other tools call the columns of a format; Dolly's context may be absent."""
OPTIONAL = {"context", "input"}

_EARLIER = ("system", "system_prompt", "history")
RIGHT = "right_answers"
USED: dict[str, set[str]] = {
    "messages": {"messages", "tools", "system", "system_prompt", RIGHT},
    "sharegpt": {"conversations", "tools", "system", "system_prompt", RIGHT},
    "prompt_answer": {"prompt", "answer", "tools", *_EARLIER, RIGHT},
    "sentence_label": {"sentence", "label", RIGHT},
    "alpaca": {"instruction", "input", "output", "tools", *_EARLIER, RIGHT},
    "text": {"text"},
}
"""The columns that a format reads."""
VERDICTS = ("label", "kto_tag")
"""Columns of preference data that say by true or false whether the answer is good."""
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_MEANING = {*VERDICTS, "chosen", "rejected", "weight", *_OTHER_MEDIA}
_ANSWERS = {
    "prompt": "answer",
    "question": "answer",
    "instruction": "output",
    "query": "response",
    "input": "output",
}
"""What the answer to a column is called beside it."""
_ANSWERED = {*_ANSWERS.values(), "completion", "reply", "replies", "target", "label"}
"""Words in the names of columns that hold answers, whatever the question beside them is called."""
_BESIDE = {"id", "uuid", "index", "date", "time", "source", "url"}
"""Words in the names of columns that say neither."""
_NO_TEXT = {"null", "none", "true", "false", "yes", "no", "on", "off", "y", "n"}
"""Words that YAML reads as something else than text."""
_PLAIN = re.compile(r"[^\W\d](?:[\w ]*\w)?")
LABEL_NAMES = "labels: [NAME OF 0, NAME OF 1, ...]"
LEFT_OUT = "leave it out with columns: {{{column}: null}}"


def detect(rows: Sequence[dict[str, Any]], file: str | Path) -> tuple[Format, dict[str, str]]:
    """Tell the format of a split by the names in its first row.

    Returns:
        The format, and what to call the columns that other tools name otherwise.

    Raises:
        DataError: the names are those of no known format.
    """
    found = rows[0].keys()
    for format in get_args(Format):
        if found >= set(KEYS[format]):
            if format == "text":
                _offer_classification(rows[0], file)
            return format, {}
    for format, names in OTHER_NAMES:
        if format == "text":
            fits = found == names.keys()
        else:
            fits = found >= names.keys() - OPTIONAL and len(found & names.keys()) >= min(2, len(names))
        if fits:
            return format, {name: meant for name, meant in names.items() if name in found and name != meant}
    if {"chosen", "rejected"} <= found:
        raise DataError(
            f"{where(file, 0, rows[0])}: chosen and rejected are preference pairs; a task is trained on answers: "
            f"columns: {{chosen: {_chosen_as(rows[0])}, rejected: null}} trains the chosen ones, "
            "and kind: dpo (stream.tasks) the preference"
        )
    known = ", ".join(f"{format} {{{', '.join(keys)}}}" for format, keys in KEYS.items())
    raise DataError(
        f"{where(file, 0, rows[0])}: the keys {', '.join(map(repr, found))} are no known shape; known: {known}; "
        f"columns renames them{_suggested(rows[0])}"
    )


def _suggested(row: dict[str, Any]) -> str:
    """How to name the columns of a row of no known shape, as far as their names or their order tell it.

    What is to be typed is quoted for YAML and for a shell, since the names come from the file.
    """
    texts = [key for key, value in row.items() if isinstance(value, str) and key.strip() and value.strip()]
    if {"role", "content"} <= row.keys():
        return "; a row is a whole conversation, such as messages: [{role: user, content: ...}, ...], and not a turn"
    answers = [key for key in texts if _words(key) & _ANSWERED]
    prompts = [key for key in texts if key not in answers and _words(key) & {"prompt", "frage", *_ANSWERS}]
    others = [key for key in texts if key not in answers and key not in prompts and not _words(key) & _BESIDE]
    prompt = next(iter([*prompts, *others]), None)
    answer = next((key for key in [*answers, *reversed(others)] if key != prompt), None)
    if prompt is None or answer is None:
        return ""
    named = {key: name for key, name in ((prompt, "prompt"), (answer, "answer")) if key != name}
    columns = ", ".join(f"{key if _is_plain(key) else json_text(key)}: {name}" for key, name in named.items())
    typed = shlex.quote(f"task={{columns: {{{columns}}}}}")
    return f", for example columns: {{{columns}}} of a task, or {typed} after holdfast learn"


def _words(column: str) -> set[str]:
    return set(re.findall(r"[a-z]+", column.lower()))


def _is_plain(key: str) -> bool:
    """Whether YAML reads a key as this very text without quotes."""
    return bool(_PLAIN.fullmatch(key)) and key.lower() not in _NO_TEXT


def _chosen_as(row: dict[str, Any]) -> str:
    """What to call the chosen ones of preference pairs, so that their rows have a known format."""
    if _has_turns(row["chosen"]) and not _has_turns(row.get("prompt")):
        return "messages"
    return next((answer for question, answer in _ANSWERS.items() if question in row), "text")


def _offer_classification(row: dict[str, Any], file: str | Path) -> None:
    for column in ("label", "labels"):
        if row.get(column) is not None:
            names = "{text: sentence}" if column == "label" else "{text: sentence, labels: label}"
            meaning = f" with {LABEL_NAMES}" if type(row[column]) is int else ""
            raise DataError(
                f"{where(file, 0, row)}: {column}: a text with a label looks like classification; columns: {names}"
                f"{meaning} asks for the label, and format: text trains on the texts alone"
            )


def to_examples(rows: Iterable[dict[str, Any]], format: str, **options: Any) -> list[Example]:
    """All that :func:`iterate_examples` gives."""
    return list(iterate_examples(rows, format, **options))


def iterate_examples(
    rows: Iterable[dict[str, Any]],
    format: str,
    *,
    file: str | Path,
    labels: list[str] | None = None,
    instruction: str | None = None,
    prompt: str | None = None,
    input: str | None = None,
    each: bool = False,
    images: Path | None = None,
    bad: list[str] | None = None,
    noticed: Noticed | None = None,
) -> Iterator[Example]:
    """Turn the rows of one split into examples, one after another.

    Args:
        rows: what `iterate_rows` gives.
        format: one of `KEYS`.
        file: where the rows came from, for messages.
        labels: the answers that a row may have; None: any.
        instruction: what is asked about each sentence of a sentence_label split.
        prompt: how a sentence_label row is asked; where absent, as :func:`asked` says.
        input: regular expression whose group 1 is what the prompt of a prompt_answer row is about; None: all of it.
        each: a conversation gives an example for each of its answers, after the true ones before, not for its last.
        images: what paths of pictures are relative to; None: the file's folder.
        bad: what is wrong with rows that cannot be used is added to it, and they are left out. None: the first raises.
        noticed: what is noticed of the rows is noted in it.

    Raises:
        ConfigError: the format is unknown.
        DataError: a row is not of the format; the message names file, row, line and reason.
    """
    if format not in KEYS:
        raise ConfigError(f"format: unknown format {format!r}{did_you_mean(format, KEYS)}")
    template, known = asked(instruction, labels, prompt), USED[format] | {*COLUMNS}
    folder = Path(file).parent if images is None else images
    for position, row in enumerate(rows):
        examples: list[Example] = []
        index = getattr(row, "index", position)
        try:
            _refuse_meaning(row, format)
            if format not in ("sentence_label", "text") and _says_bad(row):
                if noticed is not None:
                    noticed.bad_answers += 1
                continue
            said, pictures = (row, []) if format == "text" else take_pictures(row, folder)
            tools = tools_of(said) if "tools" in USED[format] else None
            turns = () if format == "text" else _turns(said, format, template, input, noticed)
            turns = with_pictures(turns, pictures) if pictures else turns
            if format == "text":
                examples.append(Example(file=str(file), row=index, text=text_field(row, "text")))
            ends = [end for end, turn in enumerate(turns, 1) if turn.role == "assistant"]
            chosen = list(enumerate(ends)) if each else [(None, end) for end in ends[-1:]]
            for _, end in chosen if labels is not None else ():
                _check_label(turns[end - 1].said, labels)
            also_right = _also_right(row, turns[ends[-1] - 1]) if ends else ()
            examples += [
                Example(
                    file=str(file),
                    row=index,
                    turns=turns[:end],
                    number=number,
                    also_right=also_right if end == ends[-1] else (),
                    tools=tools,
                )
                for number, end in chosen
            ]
        except BadRowError as error:
            message = f"{where(file, index, row)}: {error}"
            if bad is None:
                raise DataError(message) from None
            bad.append(message)
        if noticed is not None:
            for name in row.keys() - known:
                if row[name] is not None and not (name in VERDICTS and row[name] is True):
                    noticed.unused.add(name)
        yield from examples


def all_said(row: dict[str, Any], file: str | Path, index: int) -> str | None:
    """All that a row of a task says, turn by turn, on lines of their own; None where its keys are those of no format.

    Raises:
        DataError: the row is not of the format that its keys tell.
    """
    try:
        format, names = detect([row], file)
    except DataError:
        return None
    try:
        turns = _turns({names.get(key, key): value for key, value in row.items()}, format, asked(None, None), None)
    except BadRowError as error:
        raise DataError(f"{where(file, index, row)}: {error}") from None
    return "\n".join(turn.said for turn in turns)


def asked(instruction: str | None, labels: list[str] | None, prompt: str | None = None) -> str:
    """How a sentence_label row is asked, with {sentence} in its place.

    O-LoRA's prompt where none is given: instruction, options, sentence, "Answer:". Without an instruction the sentence
    asks itself.
    """
    if prompt is None:
        options = "Option: {labels}\n" if labels else ""
        prompt = ("{instruction}\n" + options if instruction else "") + "{sentence}\nAnswer:"
    return prompt.replace("{labels}", ", ".join(labels or [])).replace("{instruction}", (instruction or "").rstrip())


def _turns(
    row: dict[str, Any], format: str, template: str, input: str | None, noticed: Noticed | None = None
) -> tuple[Turn, ...]:
    match format:
        case "prompt_answer" if _has_turns(row.get("prompt")):
            return _earlier(row, conversation(_messages(row), "prompt and answer", noticed))
        case "prompt_answer":
            prompt = text_field(row, "prompt")
            answer = Turn("assistant", text_field(row, "answer").strip())
            return _earlier(row, (Turn("user", prompt, _about(prompt, input)), answer))
        case "sentence_label":
            sentence, label = text_field(row, "sentence"), text_field(row, "label").strip()
            before, _, after = template.partition("{sentence}")
            cut = (len(before), len(before) + len(sentence))
            return Turn("user", before + sentence + after, cut), Turn("assistant", label)
        case "alpaca":
            instruction = text_field(row, "instruction")
            text = text_field(row, "input", may_be_empty=True) if row.get("input") is not None else ""
            question = Turn("user", instruction)
            if text.strip():
                start = len(instruction) + 1
                question = Turn("user", f"{instruction}\n{text}", (start, start + len(text)))
            return _earlier(row, (question, Turn("assistant", text_field(row, "output").strip())))
        case "messages":
            return _earlier(row, conversation(field_value(row, "messages"), "messages", noticed))
        case "sharegpt":
            return _earlier(row, conversation(field_value(row, "conversations"), "conversations", noticed))
    raise AssertionError(format)


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _messages(row: dict[str, Any]) -> list[Any]:
    """One conversation of a prompt of turns, and an answer of turns or of text, as TRL has them."""
    answer = field_value(row, "answer")
    return row["prompt"] + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])


def _earlier(row: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns after what the row's system prompt and history say."""
    if row.keys().isdisjoint(_EARLIER):
        return turns
    before: list[Turn] = []
    for key in ("system", "system_prompt"):
        if row.get(key):
            before.append(Turn("system", text_field(row, key, may_be_empty=True)))
    if before and any(turn.role == "system" for turn in turns):
        raise BadRowError("system: stands beside a conversation that has a system turn of its own; keep one of them")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRowError(f"history: must be a list of pairs of a question and its answer, not {type_name(history)}")
    for number, (question, answer) in enumerate(history, 1):
        pair = {"question": question, "answer": answer}
        said = text_field(pair, "question", f"history, pair {number}")
        before.append(Turn("user", said, (0, len(said))))
        before.append(Turn("assistant", text_field(pair, "answer", f"history, pair {number}").strip()))
    return (*before, *turns)


def _also_right(row: dict[str, Any], answer: Turn) -> tuple[str, ...]:
    """The row's right answers without its own, which is one of them; where it is not, it is right beside them."""
    values = row.get(RIGHT)
    if values is None:
        return ()
    if not isinstance(values, list):
        found = f"{type_name(values)} ({values!r:.40})"
        raise BadRowError(f"{RIGHT}: must be a list of all texts that are right, not {found}")
    numbered = {f"number {number}": value for number, value in enumerate(values, 1)}
    right = [text_field(numbered, number, RIGHT).strip() for number in numbered]
    if answer.said in right:
        right.remove(answer.said)
    return tuple(right)


def _refuse_meaning(row: Mapping[str, Any], format: str) -> None:
    """Columns that change what a row means, and that cannot be used, are refused."""
    if row.keys().isdisjoint(_MEANING) and format != "text":
        return
    left_out = LEFT_OUT.format
    for column in VERDICTS:
        value = row.get(column)
        if format not in ("sentence_label", "text") and isinstance(value, int | float) and not isinstance(value, bool):
            raise BadRowError(
                f"{column}: {value!r} may say how good the answer is (preference data), and every answer would be "
                f"trained; make it true or false, which trains the good answers, or {left_out(column=column)}"
            )
    for column in ("chosen", "rejected"):
        if row.get(column) is not None:
            raise BadRowError(
                f"{column}: belongs to preference pairs, and would not be used; {left_out(column=column)}"
            )
    if row.get("weight") is not None and row["weight"] != 1:
        raise BadRowError(
            f"weight: rows are not weighted, and this one's weight is {row['weight']!r:.40}; take rows of weight 0 "
            f"out, and {left_out(column='weight')}"
        )
    for column in (*_OTHER_MEDIA, *(COLUMNS if format == "text" else ())):
        if row.get(column):
            alone = "a text shows no picture" if column in COLUMNS else "text and pictures alone can be trained"
            raise BadRowError(f"{column}: {alone}; {left_out(column=column)}")


def _says_bad(row: Mapping[str, Any]) -> bool:
    """Whether a column says that the answer is bad."""
    return not row.keys().isdisjoint(VERDICTS) and any(row.get(column) is False for column in VERDICTS)


def _about(prompt: str, input: str | None) -> tuple[int, int]:
    """The span of a prompt that says what it is about."""
    if input is None:
        return 0, len(prompt)
    span = group_span(input, prompt)
    if span is None:
        raise BadRowError(f"prompt: does not match {input!r}, the task's input")
    return span


def name_labels(
    rows: Iterable[dict[str, Any]], labels: list[str] | None, file: str | Path, bad: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Put names in the place of labels that are numbers: indices of ``labels``, from 0.

    If labels are numbers themselves, a number is the label of that name.

    Args:
        rows: of sentence_label.
        labels: their names; None: they are not known.
        bad: as of :func:`to_examples`.

    Raises:
        DataError: the first row's label is a number, and ``labels`` is None; a number is no index.
    """
    by_name = any(label.isdecimal() for label in labels or ())
    names = {label if by_name else str(index): label for index, label in enumerate(labels or ())}
    for position, row in enumerate(rows):
        label = row.get("label")
        if labels is None:
            if position == 0 and type(label) is int:
                place = where(file, getattr(row, "index", 0), row)
                raise DataError(
                    f"{place}: label: is a number ({label}) without a name; give the task {LABEL_NAMES}; "
                    "a folder may have them in labels.json"
                )
        elif type(label) is int or (isinstance(label, str) and label.strip().isdecimal()):
            name = names.get(str(label).strip())
            if name is None:
                reason = "one of them" if by_name else f"an index from 0 to {len(labels) - 1}"
                message = (
                    f"{where(file, getattr(row, 'index', position), row)}: label: {label!r:.40} is none of the "
                    f"{len(labels)} labels ({', '.join(labels)}); it must be {reason}"
                )
                if bad is None:
                    raise DataError(message)
                bad.append(message)
                continue
            row["label"] = name
        yield row


def _check_label(answer: str, labels: list[str] | None) -> None:
    if labels is not None and answer not in labels:
        near = did_you_mean(answer, labels)
        raise BadRowError(
            f"label: {answer!r:.60} is not one of the labels ({', '.join(labels)})"
            + (near if near.startswith("; did") else "")
        )
