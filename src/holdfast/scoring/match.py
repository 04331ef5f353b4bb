"""Exact match: the whole response against the whole answer, and what other code calls accuracy."""

from __future__ import annotations

import string
import unicodedata

from holdfast.api.scorer import Scorer

# Signs before and after an answer that are not part of it. Signs with a meaning there (-5, .5, 5%, C#) are not among
# them.
_QUOTES = "\"'`"
_BEFORE = _QUOTES + "¿¡"
_AFTER = _QUOTES + ".,;:!?。、।؟،؛"
_INVISIBLE = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"))


def accuracy(response: str, answer: str) -> float:
    """1 if the whole response equals the whole answer after :func:`normalize`, otherwise 0."""
    return float(normalize(response) == normalize(answer))


def normalize(text: str) -> str:
    """Bring a response or an answer into the form in which accuracy compares them.

    In order: Unicode NFKC and case folding (full-width forms, ligatures and capitals become plain); invisible marks of
    writing direction and byte order are removed; each run of whitespace becomes one space, and none stays at the ends;
    quotation marks, opening brackets and ¿ ¡ are removed from the beginning, and quotation marks, closing brackets and
    . , ; : ! ? (and those of Chinese, Hindi and Arabic) from the end. Text that consists of such signs only is not
    changed. So "Positive." equals "positive", and "75" is not "7".
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.translate(_INVISIBLE).split())
    start, end = 0, len(text)
    while start < end and _around(text[start], _BEFORE, "Ps"):
        start += 1
    while end > start and _around(text[end - 1], _AFTER, "Pe"):
        end -= 1
    return text[start:end] or text


def _around(character: str, signs: str, bracket: str) -> bool:
    # Unicode categories: Pi and Pf are quotation marks, Ps and Pe opening and closing brackets.
    return character.isspace() or character in signs or unicodedata.category(character) in ("Pi", "Pf", bracket)


def trace_exact_match(response: str, answer: str) -> float:
    """1 if response and answer are the same text, otherwise 0: TRACE's evaluation. An empty response scores 0."""
    return float(bool(response) and response == answer)


def tree_lora_prefix_match(response: str, answer: str) -> float:
    """1 if the response, stripped, begins with the answer, letter case and all, otherwise 0; so "75" counts for "7".

    TreeLoRA's evaluation of TRACE and of O-LoRA's tasks. An empty response or answer scores 0. The answer is not
    stripped: one that begins with white space is never met.
    """
    return float(bool(answer) and response.strip()[: len(answer)] == answer)


def trace_prefix_match(response: str, answer: str) -> float:
    """1 if the response begins with the answer, letter case and all, otherwise 0; so "75" counts for "7".

    Of holdfast 0.1.0, which took it for TRACE's and TreeLoRA's; TRACE's own is :func:`trace_exact_match`, TreeLoRA's
    :func:`tree_lora_prefix_match`. An empty response scores 0.
    """
    return float(bool(response and answer) and response.startswith(answer))


def trace_first_character(response: str, answer: str) -> float:
    """1 if response and answer begin with the same character, case and all, otherwise 0.

    TRACE's evaluation of its ScienceQA, whose answers are a letter and then reasons; "Because" counts for "B". An empty
    response or answer, at which TRACE's code fails, scores 0.
    """
    return float(bool(response and answer) and response[0] == answer[0])


def tree_lora_first_character(response: str, answer: str) -> float:
    """:func:`trace_first_character` of the stripped texts: TreeLoRA's evaluation of ScienceQA.

    Its code puts N/A in the place of an empty text, so that an empty response counts where the answer begins with N,
    or is empty, too.
    """
    first, right = (text.strip()[:1] or "N/A" for text in (response, answer))
    return tree_lora_prefix_match(first, right)


def o_lora_exact_match(response: str, answer: str) -> float:
    """1 if response and answer are equal in lower case, without ASCII punctuation and with single spaces, otherwise 0.

    O-LoRA's evaluation, which is that of Super-NaturalInstructions (Wang et al. 2022, arXiv 2204.07705). Unlike
    :func:`accuracy` it removes signs from the middle too: "-5" counts for "5" and "sci/tech" for "scitech".
    """
    return float(_bare(response) == _bare(answer))


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


SCORERS = [
    Scorer("accuracy", accuracy, "the whole response equals the answer, but for case, space and signs around it"),
    Scorer("trace_exact_match", trace_exact_match, "the same text, to the last character (TRACE)"),
    Scorer("trace_first_character", trace_first_character, "the first characters are equal (TRACE's ScienceQA)", 2),
    Scorer("tree_lora_prefix_match", tree_lora_prefix_match, "it begins with the answer (TreeLoRA; 75 counts for 7)"),
    Scorer("tree_lora_first_character", tree_lora_first_character, "the same, stripped (TreeLoRA's ScienceQA)"),
    Scorer("trace_prefix_match", trace_prefix_match, "it begins with the answer (of holdfast 0.1.0, and no source's)"),
    Scorer("o_lora_exact_match", o_lora_exact_match, "equal in lower case without any punctuation (O-LoRA)"),
]
