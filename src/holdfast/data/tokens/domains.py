"""Domain tokens: the special tokens that say which domain a text is from."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

DOMAIN = re.compile(r"[\w.-]+")
_DOMAIN_TOKEN = re.compile(rf"<\|({DOMAIN.pattern})\|>")


def domain_token(name: str) -> str:
    """The special token that stands for a domain, or is reserved for one: ``<|NAME|>``."""
    return f"<|{name}|>"


def domain_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The domains of a tokenizer, and the ids of their tokens: of all special tokens of the form ``<|NAME|>``."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    names = {id: _DOMAIN_TOKEN.fullmatch(token.content) for id, token in added.items() if token.special}
    return {name[1]: id for id, name in names.items() if name}
