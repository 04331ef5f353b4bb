"""Bodies of requests: what is understood, and refusals that name the parameter."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.deploy.openai.errors import RequestError
from holdfast.errors import did_you_mean
from holdfast.models.batcher import Sampling

MOST_ANSWERS = 128  # of one request
MOST_LOGPROBS = 20
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Parameters for those who run a service, on which no answer depends."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "suffix": ("",),
    "service_tier": ("auto", "default"),
}
"""Parameters that are not supported, and the values with which they ask for nothing."""

NOT_DONE = {
    "tools": "calls of tools are not read out of answers",
    "functions": "calls of tools are not read out of answers",
    "response_format": "answers are not bound to a format",
    "suffix": "a model continues its prompt, and knows no text behind it",
}

B = TypeVar("B", bound="Body")
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=32)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """Tokens of an answer, if the request says so."""
        return self.max_tokens

    @property
    def candidates(self) -> int:
        """Answers to generate to each prompt."""
        return self.n

    @property
    def top_logprobs_count(self) -> int | None:
        """The likeliest tokens to report; None: no log-probabilities."""
        return None

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int, vocabulary: int) -> Sampling:
        """How the tokens of an answer are chosen; ``number`` is the answer's among those of the request."""
        bias = {}
        for key, value in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
                raise RequestError(
                    f"logit_bias: {key[:40]!r} is no token; tokens are 0 to {vocabulary - 1}", "logit_bias"
                )
            bias[int(key)] = value
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            seed=None if self.seed is None else (self.seed + number) % 2**63,
            logprobs=self.top_logprobs_count,
        )


class CompletionBody(Body):
    """``POST /v1/completions``."""

    prompt: Any
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    @property
    def top_logprobs_count(self) -> int | None:
        return 0 if self.logprobs is None and self.candidates > self.n else self.logprobs


class ChatBody(Body):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read_json(body: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        RequestError: it is none.
    """

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice[:80]!r} stands twice in an object")
        return dict(pairs)

    try:
        value = json.loads(body, parse_constant=constant, object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the body holds half a character: a surrogate without its other half") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON that can be read: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def read_completion(body: dict[str, Any]) -> CompletionBody:
    """A request for completions; a RequestError names the parameter that is wrong."""
    request = _validated(CompletionBody, body)
    if request.best_of is not None and request.best_of < request.n:
        raise RequestError(f"best_of: {request.best_of} must not be less than n, which is {request.n}", "best_of")
    if request.stream and request.candidates > request.n:
        raise RequestError("best_of: the best answers are known at the end only; a stream cannot have them", "best_of")
    return request


def read_chat(body: dict[str, Any]) -> ChatBody:
    """A request for chat completions; a RequestError names the parameter that is wrong."""
    request = _validated(ChatBody, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs: needs logprobs: true", "top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise RequestError("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    return request


def _validated(kind: type[B], body: dict[str, Any]) -> B:
    given = {key: value for key, value in body.items() if value is not None and key not in WITHOUT_EFFECT}
    for key in list(given):
        if key in NEUTRAL and given.pop(key) not in NEUTRAL[key]:
            reason = NOT_DONE.get(key, "this value is not supported")
            raise RequestError(f"{key}: {reason}; leave it out", key, code="unsupported_parameter")
        if key not in NEUTRAL and key not in kind.model_fields:
            near = did_you_mean(key, kind.model_fields)
            raise RequestError(f"{key[:80]}: is no parameter here{near}", key[:80], code="unknown_parameter")
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[")))
        raise RequestError(f"{place[:120]}: {first['msg']}", name) from None
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: needs stream: true", "stream_options")
    return request
