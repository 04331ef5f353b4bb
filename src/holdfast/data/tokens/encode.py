"""Texts to token ids with a fast tokenizer, in one process or several; the order stays that of the texts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """How a document becomes tokens; small and picklable, so that each process can have it.

    Attributes:
        tokenizer: JSON of a tokenizer of the tokenizers library.
        begin: ids before a document.
        end: ids after a document.
        dtype: of the ids, as numpy names it.
    """

    tokenizer: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: str

    def load(self) -> _Encode:
        return _Encode(self)


class _Encode:
    """The tokenizer, loaded."""

    def __init__(self, how: Encoder):
        self._how = how
        self._tokenizer = Tokenizer.from_str(how.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text: what is written in a document is never a special token

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The documents end to end, [tokens]."""
        ids: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += self._how.begin
            ids += encoding.ids
            ids += self._how.end
        return np.array(ids, self._how.dtype)


class HasTexts(Protocol):
    """Documents that are encoded together, and whatever else belongs to them."""

    @property
    def texts(self) -> list[str]: ...


Part = TypeVar("Part", bound=HasTexts)


def encode(parts: Iterable[Part], encoder: Encoder, processes: int = 1) -> Iterator[tuple[Part, np.ndarray]]:
    """Encode parts and give each, in their order, with its token ids [tokens].

    Args:
        parts: taken one at a time, no more of them ahead than there are processes.
        processes: with 1, this one does it; else so many others, of which none outlives this one.

    Raises:
        RuntimeError: one of the processes was killed.
    """
    if processes == 1:
        load = encoder.load()
        for part in parts:
            yield part, load(part.texts)
        return
    busy: deque[tuple[_Worker, Part]] = deque()
    with contextlib.ExitStack() as stack:
        for part in parts:
            done = None
            if len(busy) < processes:
                worker = stack.enter_context(_Worker(encoder))
            else:
                worker, earlier = busy.popleft()
                done = earlier, worker.receive()
            worker.send(part.texts)
            busy.append((worker, part))
            if done:
                yield done
        for worker, earlier in busy:
            yield earlier, worker.receive()


class _Worker:
    """A process that encodes one part at a time; it ends when its pipe closes, so also when this process is killed."""

    def __init__(self, encoder: Encoder):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(encoder, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()

    def send(self, texts: list[str]) -> None:
        try:
            self._pipe.send(texts)
        except OSError:
            raise self._gone() from None

    def receive(self) -> np.ndarray:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None

    def _gone(self) -> RuntimeError:
        self._process.join()
        return RuntimeError(
            f"a process that tokenises ended with exit code {self._process.exitcode}; -9 often means that the memory "
            "was full, and fewer processes need less"
        )


def _work(encoder: Encoder, pipe: connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load = encoder.load()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(load(pipe.recv()))
