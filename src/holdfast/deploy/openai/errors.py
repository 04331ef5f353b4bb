"""Refused requests, in OpenAI's format."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is not answered.

    Args:
        message: what is wrong, and what would be right.
        param: the parameter that is wrong.
        code: OpenAI's name of the fault, where it has one.
        status: of the HTTP response.
        kind: ``type`` in the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.kind = message, param, code, status, kind

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def too_long(context: int, prompt: int, max_tokens: int, param: str) -> RequestError:
    """The refusal of a prompt that does not fit into the context with its answer."""
    return RequestError(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + max_tokens} tokens "
        f"({prompt} in the prompt, {max_tokens} in the completion). Please reduce the length of the prompt or of the "
        "completion.",
        param,
        code="context_length_exceeded",
    )
