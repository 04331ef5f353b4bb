"""A run's real server, in a thread of this process."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn

from holdfast.deploy.serve import application
from holdfast.runner.reload import find_stage
from holdfast.system.machine import free_port


class Server:
    """It counts the answers that it gave to each prompt."""

    def __init__(self, path: Path):
        self.path = path
        self.answered: Counter[str] = Counter()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    async def counted(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""

        async def received() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def sent(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body") and body:
                asked = json.loads(body)
                self.answered[str(asked.get("prompt", asked.get("messages")))] += 1

        await self.app(scope, received, sent)

    def start(self) -> None:
        self.app = application(find_stage(self.path))
        config = uvicorn.Config(
            self.counted, host="127.0.0.1", port=self.port, log_level="error", interface="asgi3", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
