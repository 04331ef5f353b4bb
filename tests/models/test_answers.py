"""Answers that are kept as they come are never asked for again, by a method, a judge or a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.config.evaluation import EvaluationConfig
from holdfast.errors import ConfigError
from holdfast.evaluation import respond
from holdfast.models.answers import AnswerCache
from holdfast.runner.run import run
from holdfast.scoring import build
from support.doubles import ChatServer
from support.tiny import tiny_config


def ask_all(kept: AnswerCache, questions: list[Any]) -> tuple[list[Any], list[Any]]:
    """The answers, which are twice the questions, and what was asked for them, one at a time."""
    asked = []

    def ask(left, add):
        for i in left:
            asked.append(questions[i])
            add([i], [2 * questions[i]])

    return kept.complete(questions, ask), asked


def test_only_what_has_no_answer_is_asked_and_each_once(tmp_path):
    path = tmp_path / "below" / "answers.jsonl"
    assert ask_all(AnswerCache(path), [3, 5, 3, 4]) == ([6, 10, 6, 8], [3, 5, 4])
    assert ask_all(AnswerCache(path), [4, 6, 5]) == ([8, 12, 10], [6])
    assert ask_all(AnswerCache(path), [6, 3]) == ([12, 6], [])


def test_a_torn_line_is_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    ask_all(AnswerCache(path), [3, 5])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert ask_all(AnswerCache(path), [3, 5]) == ([6, 10], [3, 5][lines:])
        assert path.read_bytes() == whole


def test_a_process_that_does_not_write_leaves_the_file_alone(tmp_path):
    path = tmp_path / "answers.jsonl"
    ask_all(AnswerCache(path), [3])
    path.write_bytes(before := path.read_bytes() + b'{"torn')
    assert ask_all(AnswerCache(path, writes=False), [3, 5]) == ([6, 10], [5])
    assert path.read_bytes() == before


def test_a_killed_evaluation_asks_the_rest_and_ends_the_same(tmp_path, monkeypatch):
    """Killed in the second batch of a task, and in the second of the general texts."""
    (tmp_path / "general.txt").write_text("red\ngreen and blue\na tide\n")
    general = [{"name": "sea", "path": str(tmp_path / "general.txt")}]
    config = tiny_config(tmp_path, method="frozen")
    config["evaluation"] |= {"batch_size": 2, "general": general}
    seen: list[Any] = []
    left = [10**9]
    generate, token_losses = respond.generate, respond.token_losses

    def counted(function, on):
        def asked(model, rows, **options):
            keep = options[on]

            def kept(batch, answers):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                seen.extend(json.dumps(rows[i]) for i in batch)
                keep(batch, answers)

            return function(model, rows, **options | {on: kept})

        return asked

    monkeypatch.setattr(respond, "generate", counted(generate, "on_responses"))
    monkeypatch.setattr(respond, "token_losses", counted(token_losses, "on_losses"))
    whole = run(config | {"output": str(tmp_path / "whole")})
    everything, seen[:] = sorted(seen), []
    for left[0] in (1, 5, 7, 0):
        with pytest.raises(KeyboardInterrupt):
            run(config | {"output": str(tmp_path / "broken")})
    left[0] = 10**9
    assert run(config | {"output": str(tmp_path / "broken")}) == whole
    assert sorted(seen) == everything
    assert len(set(seen)) == len(seen) > 20
    for path in (tmp_path / "whole").glob("stages/*/responses/**/*.jsonl"):
        assert path.read_text() == (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_text()
    assert not list(tmp_path.rglob("answers.jsonl"))


def test_verdicts_of_a_judge_that_fails_are_kept(tmp_path: Path):
    """The judge answers four times and fails at the fifth."""
    gone = [True]

    def replies(body: dict[str, Any], number: int) -> Any:
        return (400, "gone") if gone[0] and number == 5 else "correct"

    server = ChatServer(replies)
    try:
        judge = {"url": server.url, "model": "judge-1", "concurrency": 1}
        scorer = build("judge", EvaluationConfig.model_validate({"judge": judge}))
        records = [{"prompt": f"What is {n}?", "answer": str(n), "response": f"It is {n}."} for n in range(7)]
        with pytest.raises(ConfigError, match="gone"):
            scorer.rows(records, AnswerCache(tmp_path / "answers.jsonl"))
        gone[0] = False
        assert scorer.rows(records, AnswerCache(tmp_path / "answers.jsonl")) == [1.0] * 7
        assert len(server.requests) == 8
    finally:
        server.close()
