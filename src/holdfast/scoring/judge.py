"""A language model as judge of responses, through an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.api.scorer import Record, Scorer, answers
from holdfast.errors import ConfigError
from holdfast.models.answers import AnswerCache

if TYPE_CHECKING:
    from holdfast.config.evaluation import EvaluationConfig, JudgeConfig

_VERDICT = re.compile(r"\b(correct|incorrect)\b", re.IGNORECASE)
ATTEMPTS = 3  # at a verdict, with a temperature after the first


class Judge(Scorer):
    """1 if a language model finds that the response says what the answer says, otherwise 0.

    The judge is given question, answer and response in the words of ``evaluation.judge.prompt`` and must reply with
    "correct" or "incorrect"; the last of these words in its reply counts. An empty response is wrong without asking.
    A judge errs and has tastes: compare runs by one judge only, and look at what it said of some responses.
    """

    needs = "evaluation.judge"

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__("judge", about="a language model finds that it says what the answer says (evaluation.judge)")
        self.config = config

    @property
    def identity(self) -> str:
        return f"{super().identity} {self._config.model} {self._config.prompt}"

    def configured(self, config: EvaluationConfig) -> Judge:
        if config.judge is None:
            raise ConfigError("metric judge: needs evaluation.judge, with the url and model of an endpoint")
        return Judge(config.judge)

    @property
    def _config(self) -> JudgeConfig:
        assert self.config is not None, "it is not configured"
        return self.config

    def rows(self, records: Sequence[Record], cache: AnswerCache | None = None) -> list[float]:
        from holdfast.models.endpoint import Endpoint

        config, cache = self._config, cache or AnswerCache()
        endpoint = Endpoint(
            config.url,
            config.model,
            key_variable=config.key_variable,
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
        )
        prompts = [self._prompt(record) for record in records]
        questions = [["judge", self.identity, prompt] for prompt in prompts]
        scores = {i: cache.find(question) for i, question in enumerate(questions)}
        scores |= {i: 0.0 for i, record in enumerate(records) if not record["response"].strip()}
        for attempt in range(ATTEMPTS):
            left = [i for i, score in scores.items() if score is None]

            def on_answer(number: int, reply: str, left: list[int] = left) -> None:
                if verdicts := _VERDICT.findall(reply):
                    i = left[number]
                    scores[i] = float(verdicts[-1].lower() == "correct")
                    cache.add(questions[i], scores[i])

            replies = endpoint.chat(
                [[{"role": "user", "content": prompts[i]}] for i in left],
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

    def _prompt(self, record: Record) -> str:
        """The judge's prompt; braces in a question or a response stay as they are."""
        values = {"question": record["prompt"], "answer": " / ".join(answers(record)), "response": record["response"]}
        return re.sub(r"\{(question|answer|response)\}", lambda match: values[match.group(1)], self._config.prompt)


SCORERS = [Judge()]
