"""The page on a corpus that a model wrote: lengths, tokens, loss, repetition, overlap, and a few samples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.data.texts import read_texts
from holdfast.errors import DataError
from holdfast.models.pretrained import load_saved_tokenizer
from holdfast.rehearsal.corpus import TOKENIZER, corpus_files, read_manifest, read_shard
from holdfast.rehearsal.statistics import LONG, Rows, Statistics, by_rank, histogram, shared
from holdfast.report.html import render
from holdfast.report.packed import pack_text
from holdfast.report.plots import Plot, templates
from holdfast.report.text import number
from holdfast.system.files import json_text
from holdfast.system.output import write_output

MOST = 2**22  # tokens that are looked at
TOP = 20  # of the most frequent tokens
DASHES = ("solid", "dash")


@dataclass(frozen=True)
class Sample:
    """One line of a corpus, and its loss: nats per drawn token."""

    number: int
    ids: np.ndarray
    drawn: int
    log_prob: float

    @property
    def loss(self) -> float:
        return -self.log_prob / self.drawn


def write_corpus_page(corpus: Path, output: Path, against: Path | None = None) -> Path:
    """Write a page on a finished corpus, as one HTML file that needs nothing else.

    Args:
        corpus: a folder that `holdfast replay` wrote; of a large one the first four million tokens are looked at.
        output: where to write; the file appears whole or not at all.
        against: real text (a file or folder of texts, or a token file), of which as much is looked at beside it.

    Returns:
        ``output``.

    Raises:
        DataError: the corpus is unfinished or damaged, or the text beside it cannot be read or is too short.
    """
    files = corpus_files(corpus)
    manifest = read_manifest(corpus)
    tokenizer = load_saved_tokenizer(corpus / TOKENIZER, DataError)
    samples = _samples(files)
    rows = [sample.ids for sample in samples]
    found = {"the model": Statistics.of(rows)}
    reference = _reference(against, tokenizer, rows) if against is not None else None
    if reference is not None:
        found["real text"] = Statistics.of(reference)
    page = {
        "title": f"{corpus.name}: what the model wrote",
        "manifest": manifest,
        "begins": [_text(tokenizer, [token]) for token in manifest["settings"]["request"]["start"]],
        "looked_at": len(samples),
        "columns": list(found),
        "figures": _figures(manifest, samples, found, None if reference is None else shared(rows, reference)),
        "headline": _headline(manifest, found["the model"]),
        "lengths": sorted({len(row) for row in rows}),
        "frequent": _frequent(tokenizer, found),
        "chosen": [(why, one, _text(tokenizer, one.ids)) for why, one in _chosen(samples)],
    }
    plots = {
        "lengths": _bars([len(row) for row in rows], "tokens of a sample"),
        "losses": _bars([sample.loss for sample in samples], "nats per drawn token"),
        "ranks": _ranks(found),
    }
    html = render(
        "corpus.html.j2",
        scripts=("unpack.js", "page.js"),
        plots=plots,
        data={"plots": pack_text(json_text({"figures": plots, "templates": templates()}))},
        **page,
    )
    write_output(output, html)
    return output


def _samples(files: list[Path]) -> list[Sample]:
    """The first samples, of so many tokens as are looked at."""
    samples: list[Sample] = []
    left = MOST
    for path in files:
        for line in read_shard(path):
            drawn = sum(label != -100 for label in line["labels"])
            samples.append(Sample(line["number"], np.array(line["input_ids"]), drawn, line["log_prob"]))
            left -= len(line["input_ids"])
            if left <= 0:
                return samples
    return samples


def _reference(path: Path, tokenizer: Any, rows: Rows) -> Rows:
    """As much real text, in sequences of the samples' mean length."""
    from holdfast.data.tokens.build import TOKENS
    from holdfast.data.tokens.file import TokenFile

    tokens = sum(map(len, rows))
    length = max(1, round(tokens / len(rows)))
    if (path / TOKENS).exists():
        found = TokenFile.open(path, tokenizer).rows(length)
        return list(found.batch(range(min(len(rows), len(found)))).numpy())
    ids: list[int] = []
    texts = read_texts(path)
    while len(ids) < tokens and (part := list(islice(texts, 100))):
        for one in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += one
    if len(ids) < length:
        raise DataError(f"{path}: holds {len(ids)} tokens, fewer than one sample has ({length})")
    count = min(len(ids), tokens) // length
    return list(np.array(ids[: count * length]).reshape(count, length))


def _figures(
    manifest: dict[str, Any], samples: list[Sample], found: dict[str, Statistics], copied: float | None
) -> list[dict[str, Any]]:
    """Rows of the summary: name, definition, and a value for each column."""
    drawn = manifest["samples"] + manifest["duplicates"]
    mean = sum(len(sample.ids) for sample in samples) / len(samples)
    rows: list[tuple[str, str, list[str]]] = [
        ("samples", "Written; exact duplicates are not among them.", [f"{manifest['samples']:,}"]),
        ("tokens", "Of all samples, those that the model was given too.", [f"{manifest['tokens']:,}"]),
        (
            "duplicates left out",
            "Share of what was drawn that equalled an earlier sample.",
            [_share(manifest["duplicates"] / drawn)],
        ),
        ("length", "Mean tokens of a sample.", [f"{mean:,.1f}"]),
        (
            "loss",
            "Mean negative log-likelihood under the model that wrote it, nats per drawn token: at temperature 1, an "
            "estimate of the entropy of its text.",
            [number(-manifest["log_prob"] / manifest["supervised"])],
        ),
    ]
    stats = list(found.values())
    rows += [
        ("different tokens", "How many tokens of the vocabulary come at all.", [f"{len(s.ids):,}" for s in stats]),
        ("entropy of tokens", "Of their frequencies alone, nats.", [number(s.entropy) for s in stats]),
    ]
    for n in (2, 4, LONG):
        rows.append(
            (f"distinct {n}-grams", "Share of all that are different ones.", [_share(s.distinct[n]) for s in stats])
        )
    rows += [
        (
            "repeat themselves",
            f"Share of samples in which {LONG} tokens in a row come twice.",
            [_share(s.repeating) for s in stats],
        ),
        (
            "near duplicates",
            f"Share of samples of which more than half of the {LONG}-grams stand in other samples too.",
            [_share(s.near_duplicates) for s in stats],
        ),
    ]
    if copied is not None:
        rows.append(("in the real text", f"Share of {LONG}-grams that stand in the real text, too.", [_share(copied)]))
    return [{"label": label, "definition": definition, "values": values} for label, definition, values in rows]


def _headline(manifest: dict[str, Any], own: Statistics) -> str:
    loss = number(-manifest["log_prob"] / manifest["supervised"])
    text = f"{manifest['samples']:,} samples of {manifest['tokens']:,} tokens, at {loss} nats per drawn token."
    if own.repeating is not None:
        text += f" {_share(own.repeating) if own.repeating else 'None'} of them repeat {LONG} tokens in a row."
    return text


def _frequent(tokenizer: Any, found: dict[str, Statistics]) -> list[dict[str, Any]]:
    """The most frequent tokens of the corpus, and the share of each in every column."""
    own, *others = found.values()
    rows = []
    for token, count in zip(own.ids[:TOP].tolist(), own.counts[:TOP].tolist(), strict=True):
        shares = [count / own.tokens]
        for other in others:
            shares.append(float(other.counts[other.ids == token].sum()) / other.tokens)
        rows.append({"token": _text(tokenizer, [token]), "id": token, "shares": [_share(share) for share in shares]})
    return rows


def _chosen(samples: list[Sample]) -> list[tuple[str, Sample]]:
    """A few samples: the first ones, and those that are the least and the most usual to the model."""
    by_loss = sorted(samples, key=lambda sample: sample.loss)
    chosen = [(f"sample {sample.number}", sample) for sample in samples[:4]]
    return [*chosen, ("the lowest loss", by_loss[0]), ("the highest loss", by_loss[-1])]


def _bars(values: list[float] | list[int], title: str) -> Plot:
    middles, counts, width = histogram(values)
    trace = {
        "type": "bar",
        "x": middles,
        "y": counts,
        "width": 0.9 * width,
        "hovertemplate": "%{x:.4~g}: %{y:,}<extra></extra>",
    }
    axis = {"title": {"text": title}, "zeroline": False}
    return {"data": [trace], "layout": {"height": 260, "xaxis": axis, "yaxis": {"title": {"text": "samples"}}}}


def _ranks(found: dict[str, Statistics]) -> Plot:
    series = []
    for (name, statistics), dash in zip(found.items(), DASHES, strict=False):
        ranks, shares = by_rank(statistics.counts)
        series.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": ranks,
                "y": shares,
                "line": {"width": 2, "dash": dash},
                "hovertemplate": "rank %{x:,}: %{y:.2~%}",
            }
        )
    layout = {
        "height": 320,
        "xaxis": {"type": "log", "dtick": 1, "showgrid": True, "title": {"text": "rank of the token"}},
        "yaxis": {"type": "log", "dtick": 1, "exponentformat": "power", "title": {"text": "share of all tokens"}},
        "showlegend": len(found) > 1,
        "hovermode": "closest",
    }
    return {"data": series, "layout": layout}


def _share(share: float | None) -> str:
    if share is None:
        return "–"
    percent = 100 * share
    return f"{percent:.2g} %" if 0 < percent < 1 else f"{percent:.1f} %"


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)
