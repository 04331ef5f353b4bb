"""The page on a corpus: its statistics beside plain loops, what it says, and that it stands alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from holdfast.cli import main
from holdfast.data.tokens.file import build_tokens
from holdfast.errors import DataError
from holdfast.rehearsal.corpus import corpus_files
from holdfast.rehearsal.replay import replay
from holdfast.rehearsal.request import SampleOptions
from holdfast.rehearsal.statistics import Statistics, by_rank, histogram, ngrams, shared
from holdfast.report.corpus import write_corpus_page
from support.browser import ARGUMENTS, DRAWN, OVERFLOW
from support.tiny import tiny_tokenizer, write_model


def some_rows():
    """Random rows of few tokens; the second repeats itself, the last is nearly the first, and one is short."""
    chance = np.random.default_rng(0)
    rows = [chance.integers(0, 30, size) for size in (40, 7, 25, 31, 40)]
    rows.insert(1, np.concatenate([rows[3][:10], rows[2], rows[3][:10]]))
    rows.append(np.concatenate([rows[0][:36], chance.integers(0, 30, 4)]))
    return rows


def grams(row, n):
    return [tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)]


def test_statistics_equal_plain_loops():
    rows = some_rows()
    found = Statistics.of(rows)
    counts = Counter(int(token) for row in rows for token in row)
    assert dict(zip(found.ids.tolist(), found.counts.tolist(), strict=True)) == counts
    assert found.counts.tolist() == sorted(counts.values(), reverse=True) and found.tokens == sum(counts.values())
    p = np.array(list(counts.values())) / found.tokens
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum())
    for n, share in found.distinct.items():
        every = [gram for row in rows for gram in grams(row, n)]
        assert share == len(set(every)) / len(every)
    eights = [grams(row, 8) for row in rows]
    having = [own for own in eights if own]
    assert found.repeating == sum(len(set(own)) < len(own) for own in having) / len(having) > 0
    near = 0
    for i, own in enumerate(eights):
        others = {gram for j, other in enumerate(eights) if j != i for gram in other}
        near += sum(gram in others for gram in set(own)) > len(set(own)) / 2
    assert found.near_duplicates == near / len(having) > 0
    assert shared(rows[:2], rows[2:]) == pytest.approx(
        np.mean([gram in {g for own in eights[2:] for g in own} for own in eights[:2] for gram in own])
    )


def test_short_rows_have_no_long_ngrams():
    rows = [np.array([1, 2]), np.array([3])]
    found = Statistics.of(rows)
    assert found.repeating is None and found.near_duplicates is None and found.distinct[8] is None
    assert shared(rows, rows) is None and len(ngrams(rows, 2)[0]) == 1


def test_bins_hold_every_value_and_ranks_go_from_first_to_last():
    for values in ([5], [1, 1, 9], list(range(100)), [0.5], [0.1, 0.2, 7.7], [3.0, 2.5] * 9):
        middles, counts, width = histogram(values)
        assert sum(counts) == len(values) and len(middles) == len(counts) <= 52
        assert middles[0] - width / 2 <= min(values) and max(values) <= middles[-1] + width / 2 + 1e-9
    ranks, shares = by_rank(np.arange(5000, 0, -1))
    assert ranks[0] == 1 and ranks[-1] == 5000 and len(ranks) < 200
    assert shares[-1] == pytest.approx(1 / np.arange(5001).sum())


class Cells(HTMLParser):
    """The cells of each row of tables that is marked by the figure it shows."""

    def __init__(self, text: str):
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self._row, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self._row = dict(attributes).get("data-figure", "")
        self._inside = tag == "td" and bool(self._row)
        if self._inside:
            self.found.setdefault(self._row, []).append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "td"

    def handle_data(self, data):
        if self._inside:
            self.found[self._row][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    replay(str(write_model(folder / "model")), folder / "corpus", SampleOptions(length=30), tokens=3000, batch_size=32)
    (folder / "text.txt").write_text("\n".join(f"the sea <b> moves {i} weeds" for i in range(200)))
    build_tokens([folder / "text.txt"], folder / "tokens", tiny_tokenizer())
    return folder


@pytest.mark.parametrize("against", [None, "text.txt", "tokens"])
def test_the_page_says_what_is_in_the_corpus(against, folder, monkeypatch, capsys):
    page = folder / f"{against}.html"
    extra = [] if against is None else ["--against", str(folder / against)]
    monkeypatch.setattr(
        sys, "argv", ["holdfast", "replay", str(folder / "corpus"), "--inspect", "-o", str(page), *extra]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None) and capsys.readouterr().out == f"{page}\n"
    text = page.read_text()
    lines = [json.loads(line) for path in corpus_files(folder / "corpus") for line in path.open()]
    rows = [np.array(line["input_ids"]) for line in lines]
    own, cells = Statistics.of(rows), Cells(text).found
    assert cells["samples"][0] == "100" and cells["tokens"][0] == "3,000"
    assert cells["loss"][0] == f"{-sum(line['log_prob'] for line in lines) / 2900:.3f}"
    assert cells["entropy of tokens"][0] == f"{own.entropy:.3f}"
    assert cells["distinct 2-grams"][0] == f"{100 * own.distinct[2]:.1f} %"
    assert ("in the real text" in cells) == (against is not None)
    if against is not None:
        assert float(cells["distinct 4-grams"][1].split()[0]) < 50 < float(cells["distinct 4-grams"][0].split()[0])
    assert not re.findall(r'(?:src|href)="(?!#)', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert "&lt;s&gt;" in text and "<b>" not in text.partition("<script")[0]


def test_a_page_of_what_is_no_corpus_is_refused(folder):
    with pytest.raises(DataError, match="is no corpus that a model wrote"):
        write_corpus_page(folder / "model", folder / "page.html")
    (folder / "short.txt").write_text("sea")
    with pytest.raises(DataError, match="holds 3 tokens, fewer than one sample has \\(30\\)"):
        write_corpus_page(folder / "corpus", folder / "page.html", folder / "short.txt")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_draws_all_of_it(width, scheme, folder):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    path = write_corpus_page(folder / "corpus", folder / "drawn.html", folder / "text.txt")
    complaints = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        assert page.locator(".plot .main-svg").count() and page.evaluate(OVERFLOW) == 0
        browser.close()
    assert complaints == []
