"""Answers in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from holdfast.deploy.openai.text import BROKEN, Decoder, Told

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot hold


def completion_logprobs(decoder: Decoder, told: Sequence[Told], top: int, offset: int = 0) -> dict[str, Any]:
    """``logprobs`` of a completion.

    Args:
        top: the likeliest tokens that are reported at each place, besides the chosen one.
        offset: where the text begins in the choice's.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in told:
        own = one.token.logprob
        found["tokens"].append(decoder.token(one.token.id))
        found["token_logprobs"].append(None if own is None else _number(own))
        likeliest: dict[str, float] | None = None
        if own is not None:
            likeliest = {}
            for token, value in (*one.token.top[:top], (one.token.id, own)):
                likeliest.setdefault(decoder.token(token), _number(value))  # of tokens with one text, the likelier
        found["top_logprobs"].append(likeliest)
        found["text_offset"].append(one.start + offset)
    return found


def chat_logprobs(decoder: Decoder, told: Sequence[Told]) -> dict[str, Any]:
    """``logprobs`` of a chat completion."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = decoder.token(token)
        return {
            "token": text,
            "logprob": _number(logprob),
            "bytes": None if BROKEN in text else list(text.encode()),
        }

    content = []
    for each in told:
        assert each.token.logprob is not None
        content.append(
            one(each.token.id, each.token.logprob) | {"top_logprobs": [one(*likely) for likely in each.token.top]}
        )
    return {"content": content, "refusal": None}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _number(logprob: float) -> float:
    return logprob if isfinite(logprob) else LOWEST
