"""Load the measures of general ability of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast import data
from holdfast.api.task import PICTURE, General, HarnessTask, Stream
from holdfast.config.evaluation import GeneralConfig
from holdfast.data.choices import Question, by_letter, read_choices
from holdfast.data.conversation import BadRowError
from holdfast.data.files import read_rows, read_text, where
from holdfast.data.formats import to_examples
from holdfast.data.row_pictures import MARK, shows_pictures, take_pictures
from holdfast.data.texts import no_path
from holdfast.errors import ConfigError, DataError
from holdfast.models.pictures import Picture

MANIFEST = "manifest.json"
"""The file by which a folder is a corpus that a model wrote (:mod:`holdfast.rehearsal.corpus`)."""
QUIZ = Path(data.__file__).with_name("everyday.jsonl")
"""The questions of the built-in quiz."""
TOKENS = ("input_ids", "labels")


def load_general(configs: list[GeneralConfig] | None, stream: Stream) -> list[General]:
    """Load the measures of general ability; None: the stream's own.

    Raises:
        ConfigError: two measures have one name, or a file is not there.
        DataError: a file or row cannot be used.
    """
    if configs is None:
        return stream.general
    _check_names([config.name for config in configs])
    measures = [measure for config in configs for measure in _general(config)]
    _check_names([measure.name for measure in measures])
    return measures


def _check_names(names: list[str]) -> None:
    """ConfigError if two measures have one name."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"evaluation.general: two measures are called {name!r}")


def _general(config: GeneralConfig) -> list[General]:
    """The measures of one entry of the configuration."""
    if config.kind != "lm_eval":
        for key in ("path", "demonstrations"):
            file = getattr(config, key)
            if file and not Path(file).exists():
                raise ConfigError(f"evaluation.general: {config.name}: {key}: {no_path(Path(file))}")
        return [_from_file(config)]
    from holdfast.evaluation.harness import check_tasks

    check_tasks(config.tasks, config.include_path)
    return [
        General(f"{config.name}/{task}".lstrip("/"), "lm_eval", harness=_harness_task(config, task))
        for task in config.tasks
    ]


def _harness_task(config: GeneralConfig, task: str) -> HarnessTask:
    return HarnessTask(
        task,
        tuple(config.tasks),
        include_path=config.include_path,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        metric=config.metric,
    )


def _from_file(config: GeneralConfig) -> General:
    assert config.kind != "lm_eval"
    path = QUIZ if config.built_in else Path(config.path)
    if config.kind == "perplexity" and (path / MANIFEST).is_file():
        from holdfast.rehearsal.samples import corpus_rows  # torch comes with it

        rows = corpus_rows(path)[: config.rows]
        return General(config.name, "perplexity", rows=[{key: row[key] for key in TOKENS} for row in rows])
    if config.kind != "choices" and path.suffix == ".txt":
        texts = [line for line in read_text(path).splitlines() if line.strip()]
        if not texts:
            raise DataError(f"{path}: holds no text")
        return General(config.name, config.kind, texts=texts[: config.rows], max_new_tokens=config.max_new_tokens)
    rows = read_rows(path)[: config.rows]
    if config.kind == "choices":
        return _choices(config, rows, path)
    for i, row in enumerate(rows):
        if (column := shows_pictures(row)) is not None:
            raise DataError(f"{where(path, i, row)}: {column}: shows a picture, and kind {config.kind} asks by text")
    if config.kind == "perplexity":
        examples = to_examples(rows, "text", file=path)
        return General(config.name, "perplexity", texts=[example.text or "" for example in examples])
    prompts = [_prompt(row, where(path, i, row)) for i, row in enumerate(rows)]
    return General(config.name, "refusals", texts=prompts, max_new_tokens=config.max_new_tokens)


def _choices(config: GeneralConfig, rows: list[dict[str, Any]], path: Path) -> General:
    """A measure of questions with choices."""
    rows, questions, pictures = _questions(config, rows, path)
    shown: list[list[str]] = []
    if config.by == "letter":
        file = config.demonstrations
        dev, answered, seen = ([], [], []) if file is None else _questions(config, read_rows(Path(file)), Path(file))
        questions, shown = by_letter(rows, questions, dev, answered, config.shots, path, file, config.answers)
        before: dict[Any, list[tuple[Picture, ...]]] = {}
        for row, own in zip(dev, seen, strict=True):
            before.setdefault(row.get("subject"), []).append(own)
        pictures = [
            tuple(picture for part in [*before.get(row.get("subject"), [])[: config.shots], own] for picture in part)
            for row, own in zip(rows, pictures, strict=True)
        ]
    pictures = pictures if any(pictures) else []
    return General(config.name, "choices", questions=questions, shown=shown, pictures=pictures, by=config.by)


def _questions(
    config: GeneralConfig, rows: list[dict[str, Any]], file: Path
) -> tuple[list[dict[str, Any]], list[Question], list[tuple[Picture, ...]]]:
    """The rows of a file of questions without the columns of their pictures, the questions, and the pictures of each.

    A question has marks for its pictures; where its row has none, they stand before it.
    """
    images = Path(config.images) if config.images is not None else file.parent
    if not images.is_dir():
        raise ConfigError(f"evaluation.general: {config.name}: images: {no_path(images)}")
    texts, questions, pictures = [], [], []
    for i, row in enumerate(rows):
        place = where(file, i, row)
        try:
            text, shown = take_pictures(row, images)
        except BadRowError as error:
            raise DataError(f"{place}: {error}") from None
        question, choices, right = read_choices(text, place, config.answers)
        if shown and not any(PICTURE in one for one in (question, *choices)):
            question = PICTURE * len(shown) + question
        if question.count(PICTURE) != len(shown):
            raise DataError(f"{place}: {MARK}: must stand in the question, once for each of its {len(shown)} pictures")
        texts.append(text)
        questions.append((question, choices, right))
        pictures.append(tuple(shown))
    return texts, questions, pictures


def _prompt(row: dict[str, Any], place: str) -> str:
    """The prompt of a row with a prompt, an instruction or a goal (AdvBench)."""
    key = next((key for key in ("prompt", "instruction", "goal") if key in row), None)
    if key is None:
        raise DataError(f"{place}: must have prompt, instruction or goal; found the keys {', '.join(map(repr, row))}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{place}: {key}: must be text, not {row[key]!r}")
    return row[key]
