"""Captions of pictures: CIDEr-D, the weighted n-grams that a caption shares with those that people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from holdfast.api.scorer import Record, Scorer, answers
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.config.evaluation import EvaluationConfig
    from holdfast.models.answers import AnswerCache

_NO_WORDS = frozenset("' ` “ ” ‘ ’ . ? ! , : ; - – —") | {"''", "``", "--", "..."}


class Cider(Scorer):
    """CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726) by pycocoevalcap, in [0, 10].

    An n-gram's weight is the logarithm of the share of test rows whose right answers have it. It follows from the right
    answers of all test rows, so that a row's score depends on them too; no response changes it. With these weights a
    task's score is the mean of its rows, as in COCO's evaluation, and a bootstrap draws rows and keeps the weights.

    COCO's evaluation takes words from Stanford's tokenizer, which needs Java. Here they are those of NLTK's tokenizer,
    which differs on unusual text alone ("10:45am", "M&M's"), in lower case and without the same punctuation.
    """

    needs = "pip install 'holdfast[images]'"

    def __init__(self) -> None:
        super().__init__("cider", about="CIDEr-D of captions, in [0, 10], by pycocoevalcap (holdfast[images])")

    def configured(self, config: EvaluationConfig) -> Scorer:
        _coco_cider()
        return self

    def row(self, record: Record) -> float:
        """Of a row among no others: 0, since all its n-grams are in every row."""
        return self.rows([record])[0]

    def rows(self, records: Sequence[Record], cache: AnswerCache | None = None) -> list[float]:
        if not records:
            return []
        people = {number: [_words(answer) for answer in answers(record)] for number, record in enumerate(records)}
        responses = {number: [_words(record["response"])] for number, record in enumerate(records)}
        return [float(score) for score in _coco_cider().compute_score(people, responses)[1]]


def _coco_cider() -> Any:
    try:
        from pycocoevalcap.cider.cider import Cider as CocoCider
    except ModuleNotFoundError:
        raise ConfigError(f"metric cider: needs pycocoevalcap; {Cider.needs}") from None
    return CocoCider()


def _words(text: str) -> str:
    """The words of a caption with single spaces between them.

    Only the last full stop of a text is a word of its own, so that of a sentence before is taken from its word.
    """
    words = (word.lower() for word in _tokenizer().tokenize(text, convert_parentheses=True))
    words = (word.removesuffix(".") if word.count(".") == 1 else word for word in words)
    return " ".join(word for word in words if word and word not in _NO_WORDS)


@cache
def _tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


SCORERS = [Cider()]
