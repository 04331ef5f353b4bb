"""What a server takes upon itself."""

from dataclasses import dataclass

from holdfast.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        requests: answered or waiting at once; further ones are refused with status 429.
        concurrency: sequences under way at once; further ones wait.
        seconds: that a request may take, with its waiting.
        max_tokens: of an answer; None: what the context holds.
        body: bytes of a request.
        pictures: that a request may show, to a model that sees.
        body_with_pictures: bytes of a request to a model that sees.
    """

    requests: int = 256
    concurrency: int = 64
    seconds: float = 600.0
    max_tokens: int | None = None
    body: int = 4 << 20
    pictures: int = 16
    body_with_pictures: int = 32 << 20

    def __post_init__(self) -> None:
        if not self.seconds > 0:  # which nan is not, either
            raise ConfigError(f"--timeout: must be more than 0 seconds, not {self.seconds}")
