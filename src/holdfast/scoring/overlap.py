"""Overlap with a reference text: ROUGE-L, BLEU, and edit similarity for code."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.api.scorer import Record, Scorer, answers

# One token a character in scripts that write no spaces between words (kana, Han, Thai, Lao, Khmer, Burmese).
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_LATIN_WORD = re.compile(r"[a-z0-9]+")
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def rouge_l(response: str, answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004) over case-folded words, without stemming.

    In scripts without spaces between words (Han, kana, Thai ...) every character is a word. On plain English text the
    words, and so the score, are those of the rouge-score package 0.1.2. An empty response scores 0.
    """
    return _rouge_l(_words(response), _words(answer))


def super_ni_rouge_l(response: str, answer: str) -> float:
    """ROUGE-L F-measure over stemmed words of the letters a to z and digits: Super-NaturalInstructions' evaluation.

    Words of more than three characters are stemmed by NLTK's Porter stemmer, as in the rouge-score package 0.1.2. Text
    in any other script has no words, and scores 0.
    """
    return _rouge_l(_stems(response), _stems(answer))


def trace_rouge_l(response: str, answer: str) -> float:
    """Summary-level ROUGE-L F-measure over sets of words: TRACE's evaluation, through the ``rouge`` package 1.0.1.

    Sentences end at every full stop, words at white space. u is the set of words in the longest common subsequence of
    any sentence of the response with any of the answer, P = |u| / distinct words of the answer and R = |u| / distinct
    words of the response (TRACE passes the two the other way round, which F does not notice), F = 2PR / (P + R + 1e-8).
    An empty response or answer scores 0, as does one of full stops only, at which the package fails.
    """
    hypothesis, reference = _sentences(answer), _sentences(response)
    if not hypothesis or not reference:
        return 0.0
    union = {word for r in reference for h in hypothesis for word in _common_subsequence(r, h)}
    precision = len(union) / len({word for sentence in hypothesis for word in sentence})
    recall = len(union) / len({word for sentence in reference for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def tree_lora_rouge_l(response: str, answer: str) -> float:
    """:func:`trace_rouge_l` as TreeLoRA's code calls it: a response without a line break gets one at its end.

    Where the response ends with a full stop, that is one more sentence, of one empty word, which lowers its score a
    little. An empty response or answer scores 0.
    """
    if not response:
        return 0.0
    return trace_rouge_l(response if "\n" in response else response + "\n", answer)


def edit_similarity(response: str, answer: str) -> float:
    """1 - (insertions + deletions) / (length of both), over characters: the similarity of code in TRACE's Py150.

    rapidfuzz's ``ratio`` / 100, after the literals of Py150 are written out as CodeXGLUE does: <NUM_LIT> becomes 0,
    <STR_LIT> and <CHAR_LIT> nothing, and <STR_LIT:x>, <NUM_LIT:x> and <CHAR_LIT:x> become x. TRACE rounds each row's
    ratio to a whole percent; this does not. An empty response scores 0.
    """
    from rapidfuzz.fuzz import ratio

    return ratio(_written_out(response), _written_out(answer)) / 100 if response else 0.0


class Bleu(Scorer):
    """BLEU of all rows together, from sacrebleu with its defaults (13a words, exponential smoothing); in [0, 1].

    Corpus BLEU is no mean of rows: the counts of n-grams are summed before they are divided. A row's own score is
    sacrebleu's sentence BLEU. 13a does not split Chinese or Japanese into words; there BLEU says little.
    """

    totals_texts = True

    def row(self, record: Record) -> float:
        from sacrebleu import sentence_bleu

        return min(sentence_bleu(record["response"], list(answers(record))).score / 100, 1.0)

    def statistics(self, records: Sequence[Record]) -> NDArray[np.float64]:
        from sacrebleu.metrics import BLEU

        bleu = BLEU()
        scores = [bleu.corpus_score([record["response"]], [[a] for a in answers(record)]) for record in records]
        return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=float)

    def total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        from sacrebleu.metrics import BLEU

        counts = np.rint(sums).astype(int).reshape(-1, sums.shape[-1]).tolist()
        scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in counts]
        return np.minimum(np.array(scores).reshape(sums.shape[:-1]) / 100, 1.0)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _stems(text: str) -> list[str]:
    stem = _porter_stemmer().stem
    return [stem(word) if len(word) > 3 else word for word in _LATIN_WORD.findall(text.lower())]


@cache
def _porter_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _rouge_l(response: list[str], answer: list[str]) -> float:
    """F = 2PR / (P + R), where P and R are the longest common subsequence's shares of the response and the answer."""
    from rapidfuzz.distance.LCSseq import similarity

    common = similarity(response, answer)
    if not common:
        return 0.0
    precision, recall = common / len(response), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a sentence of white space has one, empty word, as the package has it."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence] if text else []


def _common_subsequence(x: list[str], y: list[str]) -> list[str]:
    """The longest common subsequence of two lists of words; of equally long ones the one that the package finds."""
    lengths = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, 1):
        above, row = lengths[i - 1], lengths[i]
        for j, other in enumerate(y, 1):
            row[j] = above[j - 1] + 1 if word == other else max(above[j], row[j - 1])
    i, j, common = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            common.append(x[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def _written_out(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


SCORERS = [
    Scorer("rouge_l", rouge_l, "ROUGE-L F-measure over words, or characters where a script writes no spaces"),
    Scorer("super_ni_rouge_l", super_ni_rouge_l, "ROUGE-L over stemmed a-z words (Super-NaturalInstructions)"),
    Scorer("trace_rouge_l", trace_rouge_l, "ROUGE-L over sets of words, sentence by sentence (TRACE)"),
    Scorer("tree_lora_rouge_l", tree_lora_rouge_l, "the same, the response with a line break at its end (TreeLoRA)"),
    Bleu("bleu", about="corpus BLEU of sacrebleu"),
    Scorer("edit_similarity", edit_similarity, "similarity of code by insertions and deletions (TRACE's Py150)"),
]
