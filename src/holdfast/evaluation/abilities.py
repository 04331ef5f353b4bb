"""Load the measures of general ability of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast import data
from holdfast.api.task import General, HarnessTask, Stream
from holdfast.config.evaluation import GeneralConfig
from holdfast.data.choices import by_letter, read_choices
from holdfast.data.files import read_rows, read_text, where
from holdfast.data.formats import to_examples
from holdfast.data.texts import no_path
from holdfast.errors import ConfigError, DataError

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
    if config.kind == "perplexity":
        examples = to_examples(rows, "text", file=path)
        return General(config.name, "perplexity", texts=[example.text or "" for example in examples])
    if config.kind == "refusals":
        prompts = [_prompt(row, where(path, i, row)) for i, row in enumerate(rows)]
        return General(config.name, "refusals", texts=prompts, max_new_tokens=config.max_new_tokens)
    questions = [read_choices(row, where(path, i, row), config.answers) for i, row in enumerate(rows)]
    if config.by != "letter":
        return General(config.name, "choices", questions=questions, by=config.by)
    dev = [] if config.demonstrations is None else read_rows(Path(config.demonstrations))
    lettered, shown = by_letter(rows, questions, dev, config.shots, path, config.demonstrations, config.answers)
    return General(config.name, "choices", questions=lettered, shown=shown, by="letter")


def _prompt(row: dict[str, Any], place: str) -> str:
    """The prompt of a row with a prompt, an instruction or a goal (AdvBench)."""
    key = next((key for key in ("prompt", "instruction", "goal") if key in row), None)
    if key is None:
        raise DataError(f"{place}: must have prompt, instruction or goal; found the keys {', '.join(map(repr, row))}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{place}: {key}: must be text, not {row[key]!r}")
    return row[key]
