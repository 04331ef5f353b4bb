"""Short answers about pictures as the code of CoIN and of MLLM-CL compares them; each takes the stripped response."""

from __future__ import annotations

import re

from holdfast.api.scorer import Record, Scorer, answers

_LETTERS = ("A", "B", "C", "D", "E")
_ONE_CHARACTER = re.compile(r"\b(\w)\b")


def coin_choice_letter(response: str, answer: str) -> float:
    """1 if the response's letter is the answer, otherwise 0: CoIN's evaluation of ScienceQA.

    Its letter is the whole response, or the first of "B. ...", if it is from A to E, and otherwise the first word of
    one character, in upper case; so "I see a cat" says I.
    """
    response = response.strip()
    if response not in _LETTERS and not (response[:1] in _LETTERS and response[1:3] == ". "):
        found = _ONE_CHARACTER.search(response)
        response = found[1].upper() if found else ""
    return float(bool(response) and response[0] == answer.strip())


def coin_either_contains(response: str, answer: str) -> float:
    """1 if the response contains the answer or the answer the response, case and all, otherwise 0: CoIN's ImageNet.

    An empty response, which CoIN's code finds in every answer, scores 0.
    """
    response, answer = response.strip(), answer.strip()
    return float(bool(response) and (answer in response or response in answer))


def gqa_exact_match(response: str, answer: str) -> float:
    """1 if the response, in lower case and without full stops at its end, is the answer, otherwise 0: GQA's evaluation
    (Hudson and Manning 2019, arXiv 1902.09506) after LLaVA's preparation, which CoIN uses."""
    return float(response.strip().rstrip(".").lower() == answer.strip())


def mllm_cl_contains(response: str, answer: str) -> float:
    """1 if the response contains the answer in lower case, otherwise 0: MLLM-CL's evaluation of remote sensing and
    driving.

    An answer of one word loses its full stops, and in a response of several words it must stand before or behind a
    space, or before a full stop or comma. A response with "Unanswerable" scores 0.
    """
    if "Unanswerable" in response:
        return 0.0
    response, answer = response.strip().lower(), answer.strip().lower()
    if " " in answer:
        return float(answer in response)
    answer = answer.replace(".", "")
    if " " not in response:
        return float(answer in response)
    return float(any(part in response for part in (f" {answer}", f"{answer} ", f"{answer}.", f"{answer},")))


def mllm_cl_answer_within(response: str, answer: str) -> float:
    """1 if the response contains the answer in lower case, otherwise 0: MLLM-CL's evaluation of medicine.

    A response with "Unanswerable" scores 0.
    """
    return float("Unanswerable" not in response and answer.strip().lower() in response.lower())


def mllm_cl_choice(response: str, answer: str) -> float:
    """1 if the response, in lower case without spaces and full stops, is the answer in lower case: MLLM-CL's evaluation
    of finance, whose answers are letters, yes and no. A response with "Unanswerable" scores 0."""
    bare = response.lower().replace(" ", "").replace(".", "").strip()
    return float("Unanswerable" not in response and bare == answer.strip().lower())


class MllmClScience(Scorer):
    """MLLM-CL's evaluation of science, which depends on the data set that the picture's name begins with.

    AI2D, TQA, VQA and SciVerse: 1 if the response is the answer in lower case. Others, which are maps: of a question
    "Which states" the share of the answer's parts, divided by commas, that are parts of the response, space and all; of
    any other 1 if the response contains the answer. A response with "Unanswerable" scores 0.
    """

    needs_pictures = True
    _whole = ("AI2D", "TQA", "VQA", "SciVerse")

    def row(self, record: Record) -> float:
        names = record.get("pictures") or [""]
        source = names[0].rpartition("/")[2].partition("_")[0]
        response = record["response"].strip().lower()
        if "Unanswerable" in record["response"]:
            return 0.0
        return max(self._compared(source, record["prompt"], response, answer.lower()) for answer in answers(record))

    def _compared(self, source: str, prompt: str, response: str, answer: str) -> float:
        if source in self._whole:
            return float(response == answer)
        if "Which states" in prompt:
            parts, found = answer.split(","), response.split(",")
            return sum(part in found for part in parts) / len(parts)
        return float(answer in response)


SCORERS = [
    Scorer("coin_choice_letter", coin_choice_letter, "its first single character is the letter (CoIN's ScienceQA)"),
    Scorer("coin_either_contains", coin_either_contains, "it contains the answer, or is within it (CoIN's ImageNet)"),
    Scorer("gqa_exact_match", gqa_exact_match, "equal in lower case without full stops at the end (GQA)"),
    Scorer("mllm_cl_contains", mllm_cl_contains, "it contains the answer at the edge of a word (MLLM-CL)"),
    Scorer("mllm_cl_answer_within", mllm_cl_answer_within, "it contains the answer (MLLM-CL's medicine)"),
    Scorer("mllm_cl_choice", mllm_cl_choice, "equal in lower case without spaces and full stops (MLLM-CL's finance)"),
    MllmClScience("mllm_cl_science", about="equal, or of maps contained, in lower case (MLLM-CL's science)"),
]
