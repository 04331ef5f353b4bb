"""Short answers to questions about pictures: how many of several people agree, and texts that were misread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from holdfast.api.scorer import Record, Scorer, answers

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32
"""The authors pass ``re.UNICODE``, which is 32, where ``sub`` takes the greatest number of replacements."""

_CONTRACTIONS = (
    "ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've shouldn't shouldn't've should've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't wouldn't wouldn't've would've y'all y'all'd've y'all'll you'd you'd've you'll you're "
    "you've"
)
_WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Contractions that lack one apostrophe, and the authors' one entry that takes an apostrophe away."""


def vqa_accuracy(response: str, people: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015, arXiv 1505.00468): the agreement with several people, usually ten.

    acc = mean_i min(1, #{j != i: answer_j = response} / 3), over the people i who are left out in turn

    As the authors' evaluation code has it: line breaks and tabs are spaces; if the people do not all say the same,
    their answers and the response are compared after :func:`normalized`; otherwise they are compared as they stand,
    letter case and all. With fewer people the formula is the same, so that the agreement of two is worth 1/3. Their
    formula gives one person's answer 0 in any case; one answer is compared by :func:`upper_case_match`, as the
    benchmarks of continual learning do that keep one.
    """
    if len(people) == 1:
        return upper_case_match(response, people[0])
    response, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (response, *people))
    if len(set(people)) > 1:
        response, *people = (normalized(text) for text in (response, *people))
    return _agreement(response, people)


def textvqa_accuracy(response: str, people: Sequence[str]) -> float:
    """:func:`vqa_accuracy` by the code with which TextVQA (Singh et al. 2019, arXiv 1904.08920) and CoIN evaluate.

    Answers are always normalised; before, they are in lower case, without commas and question marks, and a space stands
    before every 's.
    """
    if len(people) == 1:
        return upper_case_match(response, people[0])
    response, *people = (normalized(_textvqa_words(text)) for text in (response, *people))
    return _agreement(response, people)


def _textvqa_words(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return text.replace("\n", " ").replace("\t", " ")


def _agreement(response: str, people: Sequence[str]) -> float:
    agree, n = people.count(response), len(people)
    return (agree * min(1.0, (agree - 1) / 3) + (n - agree) * min(1.0, agree / 3)) / n


def normalized(text: str) -> str:
    """An answer as the authors of VQA compare it.

    Signs are removed if one of them stands beside a space or the text has a number with a comma, and otherwise become
    spaces (each sign is looked at by itself); full stops are removed, except before a digit; the text is in lower case;
    number words up to ten are digits and "none" is 0; articles are removed; contractions get their apostrophe.
    """
    comma = _NUMBER_WITH_COMMA.search(text) is not None
    signs = {ord(sign): "" if comma or f"{sign} " in text or f" {sign}" in text else " " for sign in _SIGNS}
    text = _FULL_STOP.sub("", text.translate(signs), count=_FULL_STOPS_REMOVED)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def upper_case_match(response: str, answer: str) -> float:
    """1 if response and answer, stripped, are equal in upper case, otherwise 0.

    CoIN's evaluation of VQAv2 and VizWiz, and of OCR-VQA, where it compares in lower case; UCIT's of all but captions.
    """
    return float(response.strip().upper() == answer.strip().upper())


def anls(response: str, answer: str) -> float:
    """ANLS of one answer (Biten et al. 2019, arXiv 1905.13648, equation 1), in lower case with single spaces.

    1 - NL if NL < 0.5, otherwise 0, with NL = Levenshtein distance / length of the longer one.
    """
    from rapidfuzz.distance.Levenshtein import normalized_distance

    response, answer = (" ".join(text.lower().split()) for text in (response, answer))
    distance = normalized_distance(response, answer)
    return 1 - distance if distance < 0.5 else 0.0


class Agreement(Scorer):
    """A score of a response by all right answers of its row together.

    Args:
        score: of a response and the answers.
    """

    def __init__(self, name: str, score: Callable[[str, Sequence[str]], float], about: str):
        super().__init__(name, about=about)
        self._score = score

    def row(self, record: Record) -> float:
        return self._score(record["response"], answers(record))


SCORERS = [
    Agreement("vqa_accuracy", vqa_accuracy, "three of ten people say the same, by the code of VQA's authors"),
    Agreement("textvqa_accuracy", textvqa_accuracy, "the same, by TextVQA's code"),
    Scorer("upper_case_match", upper_case_match, "equal in upper case (CoIN, UCIT)"),
    Scorer("anls", anls, "1 - edits / length, or 0 where half of the text is edited (DocVQA, ST-VQA)"),
]
