"""Scores of one response against its answer, in [0, 1], by name of the metric."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

from holdfast.errors import ConfigError

# What may stand before and after an answer without being part of it. Signs that carry a meaning there (-5, .5, 5%, C#)
# are not among them.
_QUOTES = "\"'`"
_BEFORE = _QUOTES + "¿¡"
_AFTER = _QUOTES + ".,;:!?。、।؟،؛"

# One token a character in scripts that write no spaces between words (kana, Han, Thai, Lao, Khmer, Burmese).
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def accuracy(response: str, answer: str) -> float:
    """1 if the whole response equals the whole answer after :func:`normalize`, otherwise 0."""
    return float(normalize(response) == normalize(answer))


def normalize(text: str) -> str:
    """Bring a response or an answer into the form in which accuracy compares them.

    In order: Unicode NFKC and case folding (full-width forms, ligatures and capitals become plain); each run of
    whitespace becomes one space, and none is left at the ends; quotation marks, opening brackets and ¿ ¡ are taken
    off the beginning; quotation marks, closing brackets and . , ; : ! ? (and those of Chinese, Hindi and Arabic) off
    the end. Text of nothing but such signs stays as it is. So "Positive." equals "positive", and "75" is not "7".
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.split())
    start, end = 0, len(text)
    while start < end and _around(text[start], _BEFORE, "Ps"):
        start += 1
    while end > start and _around(text[end - 1], _AFTER, "Pe"):
        end -= 1
    return text[start:end] or text


def _around(character: str, signs: str, bracket: str) -> bool:
    # Unicode categories: Pi and Pf are quotation marks, Ps and Pe opening and closing brackets.
    return character.isspace() or character in signs or unicodedata.category(character) in ("Pi", "Pf", bracket)


def rouge_l(response: str, answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004) over case-folded words, without stemming.

    In scripts without spaces between words (Han, kana, Thai ...) every character is a word. The rouge-score library
    computes it, and on plain English text its own default words give the same. An empty response scores 0.

    Raises:
        ConfigError: the rouge-score library is not installed.
    """
    return float(_rouge().score(answer, response)["rougeL"].fmeasure)


class _Words:
    """Tokenizer for rouge-score: its own knows the letters a to z only."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("metric rouge_l: needs the rouge-score library; pip install rouge-score") from None
    return RougeScorer(["rougeL"], tokenizer=_Words())


SCORERS: dict[str, Callable[[str, str], float]] = {"accuracy": accuracy, "rouge_l": rouge_l}
