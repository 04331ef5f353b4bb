"""A reward that differs from answer to answer, for stages of kind grpo."""

from __future__ import annotations

from typing import Any


def early_letters(completions: list[str], **columns: Any) -> list[float]:
    """The share of signs that are among the first letters of the alphabet."""
    return [sum(sign in "abcdefgh" for sign in text) / max(1, len(text)) for text in completions]
