"""The comment of a pull request: what it says, and that no name of a task or a run becomes more than text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from holdfast.records.gate import Judged, judge_directory
from holdfast.report.comment import MARK, as_comment, code
from holdfast.report.learned import _gained
from holdfast.report.text import number
from holdfast.report.verdict import as_markdown
from support.command import holdfast
from support.synthetic_runs import NASTY, make_run

EVIL = (
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png) @everyone #1",
    "a | b `c` ``d`` <!-- -->",
    "<img src=x onerror=alert(1)>\n\n# Big\n",
)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    run = make_run(tmp_path_factory.mktemp("comment") / "run", rows=40, tasks=list(EVIL))
    return judge_directory(run, {"max_forgetting": 0.05, "max_task_forgetting": 0.9}, None)


def test_names_are_nothing_but_text(judged: Judged) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(as_comment(judged, "https://ci.example/a b)[x](y)"))
    inside = [child for token in tokens for child in token.children or []]
    assert [child.attrs["href"] for child in inside if child.type == "link_open"] == [
        "https://ci.example/a%20b%29%5Bx%5D%28y%29"
    ]
    assert not [child.type for child in inside if child.type in ("image", "html_inline")]
    assert [token.content for token in tokens if token.type == "html_block"] == [MARK + "\n"]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h3"]
    spans = [child.content for child in inside if child.type == "code_inline"]
    for name in EVIL[:3]:
        assert name in spans and f"forgetting of {name}" in spans
    plain = " ".join(child.content for child in inside if child.type == "text")
    assert "@everyone" not in plain and "evil" not in plain
    widths: list[int] = []
    for token in tokens:
        widths += [0] if token.type == "tr_open" else []
        if token.type in ("th_open", "td_open"):
            widths[-1] += 1
    assert set(widths) == {6, 3, 5}


def test_names_in_notes_are_text_too(judged: Judged) -> None:
    noted = replace(judged, checks=[replace(check, note=f"not learned: {EVIL[1]}") for check in judged.checks])
    for written in (as_comment(noted), as_markdown(noted.checks, "run")):
        tokens = MarkdownIt("commonmark").enable("table").parse(written)
        inside = [child for token in tokens for child in token.children or []]
        assert not [child.type for child in inside if child.type in ("image", "link_open")]
    spans = [child.content for token in MarkdownIt().parse(as_comment(noted)) for child in token.children or []]
    assert f"not learned: {EVIL[1]}" in spans


def test_it_says_what_was_learned_and_what_was_forgotten(judged: Judged) -> None:
    lines = as_comment(judged).splitlines()
    assert lines[:2] == [MARK, "### Forgetting gate: failed"]
    summary = judged.run.matrix["summary"]
    for figure in ("average", "forgetting"):
        [line] = [line for line in lines if line.startswith(f"| {figure} |")]
        assert line.split(" | ")[1] == number(summary[figure]) and " to " in line
    names = [code(name, cell=True) for name in EVIL]
    terms = judged.run.matrix["by_task"]
    for j, name in enumerate(names):
        own = [line for line in lines if line.startswith(f"| {name} | ")]
        assert f"| {number(terms['learned'][j], True)} |" in own[0] and " to " in own[0]
        assert len(own) == (1 if j == len(names) - 1 else 2)
        if j < len(names) - 1:
            assert f"| {number(terms['forgetting'][j])} |" in own[1]
    assert "report.html" in lines[-1]
    begin = lines.index(next(line for line in lines if line.startswith("| task | before its stage")))
    for line, name in zip(lines[begin + 2 :], names, strict=False):
        assert line.startswith(f"| {name} | "), "in the order in which they were learned"


def test_of_a_run_that_learned_nothing_it_says_so_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "unlearned", rows=40)
    text = as_comment(judge_directory(run, {"max_forgetting": 1.0}, None))
    assert "### Forgetting gate: failed" in text and "**`Nothing was learned:" in text
    assert text.index("Nothing was learned") < text.index("| figure |")


@pytest.mark.parametrize("text", [*NASTY, *EVIL, "`", "``", "` `", "\\", "\\|", "||"])
def test_any_text_is_one_code_span(text: str) -> None:
    [paragraph] = [t for t in MarkdownIt("commonmark").parse(f"x {code(text)} y") if t.type == "inline"]
    kinds = [child.type for child in paragraph.children or []]
    assert kinds == (["text", "code_inline", "text"] if text.strip() else ["text"])
    cells = MarkdownIt("commonmark").enable("table").parse(f"| a | b |\n|---|---|\n| {code(text, cell=True)} | y |")
    assert sum(token.type == "td_open" for token in cells) == 2


def test_the_command_writes_it(judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = judged.run.path, tmp_path / "comment.md"
    limits = ("--max-forgetting", "99%", "--comment", file)
    assert holdfast("gate", run, *limits, "--page", "https://ci.example/page") == 0
    assert "gate: passed" in file.read_text() and "(https://ci.example/page)" in file.read_text()
    assert holdfast("gate", run, *limits, "--page", "javascript:alert(1)") == 2
    assert "--page: must be an address" in capsys.readouterr().err


def test_of_one_test_row_it_says_that_it_says_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "replay", rows=1)
    judged = judge_directory(run, {}, None)
    assert set(judged.run.learned.values()) == {False} and {ends for _, ends in judged.run.gains} == {None}
    text = as_comment(judged)
    assert "one test row says nothing" in text and "rose" not in text
    assert "one test row says nothing: whether" in "\n".join(_gained(judged.run, 1))
