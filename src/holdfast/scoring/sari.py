"""SARI: what a simplification keeps, deletes and adds, against the text that it simplifies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from holdfast.api.scorer import Record, Scorer, answers


def sari(source: str, response: str, references: Sequence[str]) -> float:
    """SARI (Xu et al. 2016, TACL 4) of one text, in [0, 1]: the mean of keep F1, deletion precision and addition F1.

    Each is a mean over n-grams of 1 to 4 words; words are sacrebleu's 13a, in lower case. With counts of n-grams in
    the source, the response and, summed, in the references, where those of source and response count once a reference:

    - keep: precision is the mean over kept n-grams of the share that references keep; recall the kept that references
      keep, of all that they keep
    - delete: the mean over deleted n-grams of the share that references do not keep
    - add: over distinct n-grams that are not in the source

    A share of nothing is 1. This is tensor2tensor's correction of the authors' script, which Hugging Face's ``sari``
    computes and TRACE used.
    """
    source_words, response_words, *reference_words = (_words(text) for text in (source, response, *references))
    parts = [
        _parts(
            _ngrams(source_words, n),
            _ngrams(response_words, n),
            [_ngrams(words, n) for words in reference_words],
        )
        for n in range(1, 5)
    ]
    return sum(sum(part) for part in parts) / (3 * len(parts))


def _parts(source: Counter[str], response: Counter[str], references: Sequence[Counter[str]]) -> tuple[float, ...]:
    """Keep F1, deletion precision and addition F1 of the n-grams of one length."""
    wanted = sum(references, Counter[str]())
    before, after = (Counter({gram: n * len(references) for gram, n in side.items()}) for side in (source, response))

    kept = before & after
    keep_precision = _mean([min(n, wanted[gram]) / n for gram, n in kept.items()])
    keep_recall = _share((kept & wanted).total(), (before & wanted).total())

    deleted = before - after
    rightly = deleted - wanted
    delete_precision = _mean([rightly[gram] / n for gram, n in deleted.items()])

    added, to_add = set(response) - set(source), set(wanted) - set(source)
    add_precision, add_recall = _share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add))
    return _f1(keep_precision, keep_recall), delete_precision, _f1(add_precision, add_recall)


def _mean(shares: list[float]) -> float:
    return sum(shares) / len(shares) if shares else 1.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _words(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower()).split(" ")


def _ngrams(words: list[str], n: int) -> Counter[str]:
    return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


class Sari(Scorer):
    """Mean SARI of the rows.

    Args:
        of: which text of a record is simplified: its ``input`` alone, or the whole ``prompt``.
    """

    def __init__(self, name: str, of: str, about: str):
        super().__init__(name, about=about)
        self._of, self.needs_input = of, of == "input"

    def row(self, record: Record) -> float:
        return sari(record.get(self._of, record["prompt"]), record["response"], answers(record))


SCORERS = [
    Sari("sari", "input", "SARI, the source being the text alone"),
    Sari("trace_sari", "prompt", "SARI, the source being the whole prompt with its instruction (TRACE)"),
]
