"""What is measured: the tasks, general abilities, and by whose judgement."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from holdfast.config.section import FREE, Section
from holdfast.errors import did_you_mean
from holdfast.system.url import split_login

HARNESS = ("tasks", "include_path", "num_fewshot", "limit", "apply_chat_template", "metric")
"""Keys of a measure of general ability that only kind lm_eval has."""

EVERYDAY = "everyday"
"""The measure of general ability that is built in: questions with choices, of common knowledge."""


class GeneralConfig(Section):
    """One measure of general ability, taken before training and after every stage."""

    example: ClassVar[str] = "{name: wiki, path: wiki.txt}"
    name_alone: ClassVar[bool] = True

    name: str = Field(
        "",
        description="what it is called in the matrix and the report; everyday without a path is the built-in quiz; of "
        "lm_eval, put before each task's name",
    )
    path: str = Field(
        "",
        description="file of texts or prompts (.txt, .jsonl) or of questions with choices (.jsonl); of a perplexity "
        "also a corpus that a model wrote (`holdfast replay`)",
    )
    kind: Literal["perplexity", "choices", "refusals", "lm_eval"] = Field(
        "perplexity",
        description="perplexity of texts, accuracy of the likeliest of several choices, share of prompts refused, or "
        "tasks of lm-evaluation-harness",
    )
    rows: int | None = Field(None, ge=1, description="use only the first n rows")
    by: Literal["acc", "acc_norm", "acc_bytes", "acc_with_end", "letter"] = Field(
        "acc",
        description="of choices, which likelihood is compared: that of the whole choice (acc of lm-eval), its "
        "logarithm divided by the choice's characters or bytes (acc_norm, acc_bytes), that of the choice and the end "
        "of the answer, or of its letter",
    )
    answers: Literal["names", "texts"] = Field(
        "names",
        description="of choices whose instruction names its answers (answer1/answer2), what is chosen from: these "
        "names, after the whole instruction, or the texts that they stand for, after the question alone",
    )
    images: str | None = Field(
        None, description="of choices, folder that the paths of pictures start from; where absent, that of the file"
    )
    shots: int = Field(0, ge=0, description="of choices by letter, answered questions of the same subject shown before")
    demonstrations: str | None = Field(None, description="file of the questions that shots shows, such as MMLU's dev")

    max_new_tokens: int = Field(64, ge=1, description="of refusals, longest response")
    tasks: list[str] = Field(default_factory=list, description="of lm_eval, names of tasks, groups or tags")
    include_path: str | None = Field(None, description="of lm_eval, folder of task definitions (YAML) of your own")
    num_fewshot: int | None = Field(None, ge=0, description="of lm_eval, examples shown; where absent, the task's own")
    limit: float | None = Field(None, gt=0, description="of lm_eval, first examples of each task; below 1, their share")
    apply_chat_template: bool = Field(False, description="of lm_eval, ask in the tokenizer's chat template")
    metric: str | None = Field(
        None, description="of lm_eval, such as acc_norm or exact_match,strict-match; where absent, each task's first"
    )

    @property
    def built_in(self) -> bool:
        """Whether its questions are those of the package."""
        return self.name == EVERYDAY and self.kind == "choices" and not self.path

    @model_validator(mode="before")
    @classmethod
    def _built_in(cls, values: Any) -> Any:
        """The built-in quiz by its name, alone or with options."""
        if isinstance(values, str):
            if values != EVERYDAY:
                raise ValueError(
                    f"there is no built-in measure {values!r}{did_you_mean(values, [EVERYDAY])}; a file of your own is "
                    f"written {cls.example}"
                )
            values = {"name": values}
        if isinstance(values, dict) and values.get("name") == EVERYDAY and not values.get("path"):
            return {"kind": "choices"} | values
        return values

    @model_validator(mode="before")
    @classmethod
    def _by_its_name_in_0_1(cls, values: Any) -> Any:
        """Version 0.1.0 called acc_with_end answer, and recorded it for every kind of measure."""
        if isinstance(values, dict) and values.get("by") == "answer":
            return values | {"by": "acc_with_end" if values.get("kind") == "choices" else "acc"}
        return values

    @model_validator(mode="after")
    def _of_kind(self) -> GeneralConfig:
        if self.kind == "lm_eval":
            if not self.tasks:
                raise ValueError("tasks: kind lm_eval needs them, for example tasks: [hellaswag]")
            others = set(GeneralConfig.model_fields) - {"name", "kind", *HARNESS}
            wrong = f"is not for kind lm_eval, which has {', '.join(HARNESS)}"
        else:
            for key in ("name", "path"):
                if not getattr(self, key) and not self.built_in:
                    raise ValueError(f"{key}: is required but absent")
            others, wrong = set(HARNESS), f"is for kind lm_eval, not {self.kind}"
        for key in sorted(others):  # they may be given with their defaults, as in run.json
            if getattr(self, key) != GeneralConfig.model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: {wrong}")
        return self

    @model_validator(mode="after")
    def _of_choices(self) -> GeneralConfig:
        if self.by != "acc" and self.kind != "choices":
            raise ValueError(f"by: {self.by} is for kind choices, not {self.kind}")
        if self.answers != "names" and self.kind != "choices":
            raise ValueError(f"answers: {self.answers} is for kind choices, not {self.kind}")
        if self.images is not None and self.kind != "choices":
            raise ValueError(f"images: is for kind choices, not {self.kind}, which is text alone")
        if self.shots and (self.by != "letter" or self.demonstrations is None):
            raise ValueError("shots: needs by: letter, and the questions to show, such as demonstrations: dev.jsonl")
        if self.demonstrations is not None and not self.shots:
            raise ValueError("demonstrations: needs shots, the number of them to show before a question, for example 5")
        return self


def _as_list(value: Any) -> Any:
    """A list of the one measure that stands alone by its name; anything else as it is."""
    return [value] if isinstance(value, str) else value


class JudgeConfig(Section):
    """The language model that metric judge asks, behind an OpenAI-compatible endpoint."""

    example: ClassVar[str] = "{url: 'http://localhost:8000/v1', model: judge}"

    url: str = Field(description="base of the endpoint, for example http://localhost:8000/v1")
    model: str = Field(description="the judge's name at the endpoint")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")
    prompt: str = Field(
        "Question:\n{question}\n\nRight answer:\n{answer}\n\nResponse:\n{response}\n\n"
        "Does the response say what the right answer says, in whatever words? Reply with one word: "
        "correct or incorrect.",
        description="what the judge is asked, from {question}, {answer} and {response}; it must reply with correct or "
        "incorrect",
    )
    max_tokens: int = Field(512, ge=1, description="longest reply of the judge")
    concurrency: int = Field(8, ge=1, description="requests under way at once", json_schema_extra=FREE)
    timeout: float = Field(60.0, gt=0, description="seconds that a request may take", json_schema_extra=FREE)
    retries: int = Field(5, ge=0, description="how often a request that failed is repeated", json_schema_extra=FREE)

    @field_validator("url")
    @classmethod
    def _has_no_login(cls, url: str) -> str:
        _, login = split_login(url)
        if login is not None:
            raise ValueError(
                "holds a user name or a password, which run.json would keep; give the URL without them, and a key in "
                "the environment variable that key_variable names"
            )
        return url

    @model_validator(mode="after")
    def _asks_about_the_response(self) -> JudgeConfig:
        if "{response}" not in self.prompt:
            raise ValueError("prompt: must hold {response}, what is judged")
        return self


class EvaluationConfig(Section):
    """What is measured after every stage."""

    example: ClassVar[str] = "{batch_size: 32}"

    split: Literal["test", "dev"] = Field(
        "test", description="rows that the tasks are measured on: test, or their eval (dev) split, to choose settings"
    )
    rows: int | None = Field(
        None,
        ge=1,
        description="test rows of each task that are measured, at even distances through its split; where absent, all",
    )
    when: Literal["all", "learned", "last"] = Field(
        "all",
        description="tasks that are measured after a stage: all; learned, those learned so far and the next one; or "
        "last, its own and the next one, and all after the last stage",
        json_schema_extra=FREE,
    )
    general_when: Literal["all", "last"] = Field(
        "all",
        description="stages after which general abilities are measured: all, or the last; always before training",
        json_schema_extra=FREE,
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what responds to test rows: transformers, or vllm, where it is installed, with a whole model of "
        "each stage or its LoRA; likelihoods are always measured by transformers",
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="of the longest prompts or sequences, read together; of shorter ones up to twice as many, in no "
        "more padded tokens",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="longest response; where absent, the longest train answer of the task and 8 more, but no more than "
        "the task allows and half of data.max_length",
    )
    general: Annotated[list[GeneralConfig] | None, BeforeValidator(_as_list)] = Field(
        None,
        description="measures of general ability; where absent, those of the stream itself, else the built-in quiz "
        "(everyday) if the model has a chat template",
    )
    similarity_model: str = Field(
        "paraphrase-multilingual-MiniLM-L12-v2",
        description="Sentence Transformers model of metric semantic_similarity: folder or hub name",
    )
    judge: JudgeConfig | None = Field(None, description="the language model that metric judge asks")
    responses: Literal["texts", "scores"] = Field(
        "texts",
        description="what is kept of each test row: its texts and scores, or its scores alone, as of data that must "
        "not lie on this disk",
    )
    bootstrap: int = Field(1000, ge=0, description="resamples for 95 % intervals over test examples; 0 turns them off")
    shift: int = Field(
        16,
        ge=0,
        description="prompts of a stage's test rows on which is measured how far the stage moves the model, by KL; 0: "
        "none",
        json_schema_extra=FREE,
    )
    every: int | None = Field(
        None,
        ge=1,
        description="steps between evaluations of a stage's own task while it trains, for its learning curve",
    )
    watch_general: int | None = Field(
        None, ge=1, description="steps between measurements of the loss on general text while a stage trains"
    )
