"""A client's connection: it is closed if it brings no request."""

from __future__ import annotations

from asyncio import BaseTransport
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_SECONDS = 10.0  # in which a connection must bring the head of a request

_Protocol: Any = AutoHTTPProtocol


class Connection(_Protocol):
    """Uvicorn's, which would wait for ever: connections without a request could take all places of a server."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._look_later()

    def _look_later(self) -> None:
        self.loop.call_later(REQUEST_SECONDS, self._look, self.cycle)

    def _look(self, before: Any) -> None:
        """Close the connection if no request has come since it was last looked at, and none is being answered."""
        if self.transport.is_closing():
            return
        if self.cycle is before and (before is None or before.response_complete):
            self.transport.close()
        else:
            self._look_later()
