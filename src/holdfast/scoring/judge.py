"""A language model as judge of responses, through an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from holdfast.api.scorer import Record, Scorer, answers
from holdfast.config.evaluation import JudgeConfig
from holdfast.errors import ConfigError
from holdfast.models.answers import AnswerCache
from holdfast.models.endpoint import Endpoint

_VERDICT = re.compile(r"\b(correct|incorrect)\b", re.IGNORECASE)
ATTEMPTS = 3  # at a verdict, with a temperature after the first


class Judge(Scorer):
    """1 if a language model finds that the response says what the answer says, otherwise 0.

    The judge is given question, answer and response in the words of ``evaluation.judge.prompt`` and must reply with
    "correct" or "incorrect"; the last of these words in its reply counts. An empty response is wrong without asking.
    A judge errs and has tastes: compare runs by one judge only, and look at what it said of some responses.
    """

    needs = "evaluation.judge"

    def __init__(self, config: JudgeConfig):
        super().__init__("judge", about=f"{config.model} says that it means what the answer means")
        self.config = config

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.config.model} {self.config.prompt}"

    def rows(self, records: Sequence[Record], kept: AnswerCache | None = None) -> list[float]:
        config, kept = self.config, kept or AnswerCache()
        endpoint = Endpoint(
            config.url,
            config.model,
            key_variable=config.key_variable,
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
        )
        questions = [self._question(record) for record in records]
        asked = [["judge", self.identity, question] for question in questions]
        scores = {i: kept.find(asked[i]) for i in range(len(records))}
        scores |= {i: 0.0 for i, record in enumerate(records) if not record["response"].strip()}
        for attempt in range(ATTEMPTS):
            left = [i for i, score in scores.items() if score is None]

            def on_answer(number: int, reply: str, left: list[int] = left) -> None:
                if verdicts := _VERDICT.findall(reply):
                    i = left[number]
                    scores[i] = float(verdicts[-1].lower() == "correct")
                    kept.add(asked[i], scores[i])

            replies = endpoint.chat(
                [[{"role": "user", "content": questions[i]}] for i in left],
                on_answer,
                temperature=0.0 if attempt == 0 else 1.0,
                max_tokens=config.max_tokens,
            )
            if None not in scores.values():
                return [scores[i] for i in range(len(records))]
        raise ConfigError(
            f"evaluation.judge: {config.model!r} gave no verdict on {[*scores.values()].count(None)} of {len(records)} "
            f"responses in {ATTEMPTS} attempts each; it must say correct or incorrect, and said {replies[-1][:200]!r}"
        )

    def _question(self, record: Record) -> str:
        """The judge's prompt; what responses hold stands in it as it is, braces and all."""
        values = {"question": record["prompt"], "answer": " / ".join(answers(record)), "response": record["response"]}
        return re.sub(r"\{(question|answer|response)\}", lambda found: values[found.group(1)], self.config.prompt)
