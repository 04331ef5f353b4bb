"""Stand-ins that need no network: a chat server on loopback, and a small model of sentence embeddings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

Reply = str | tuple[int, str]


class ChatServer:
    """An OpenAI-compatible server on loopback.

    ``replies`` is called with each request's body and its number, from 1; it gives the answer, or a status and why.
    It is asked by chat or, where ``route`` says so, by completions.
    """

    def __init__(self, replies: Callable[[dict[str, Any], int], Reply], route: str = "chat/completions"):
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != f"/v1/{route}":
                    self.answer(404, "no such route")
                    return
                with lock:
                    outer.requests.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    found = replies(body, len(outer.requests))
                status, text = found if isinstance(found, tuple) else (200, found)
                self.answer(status, text)

            def answer(self, status: int, text: str) -> None:
                message = {"choices": [{"message": {"role": "assistant", "content": text}, "text": text}]}
                payload = json.dumps(message if status == 200 else {"error": text}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def write_sentence_model(folder: Path) -> Path:
    """A Sentence Transformers model of word vectors: great is near good, and bad is at a right angle to it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "good", "great", "bad", "bed", "sun"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[0, 0, 1], [1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [-1, 0, 0], [0, 0.6, 0.8]], dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(folder))
    return folder
