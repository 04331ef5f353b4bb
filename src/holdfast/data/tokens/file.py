"""Token files: documents as one flat array of token ids on disk, of which rows are read from the memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from holdfast.api.rows import IGNORED
from holdfast.data.texts import no_path, read_texts
from holdfast.data.tokens.build import (
    DTYPES,
    JOURNAL,
    MANIFEST,
    TOKENIZER,
    TOKENS,
    Build,
    source_bytes,
    source_digest,
    unfinished,
)
from holdfast.data.tokens.domains import domain_ids, domain_token
from holdfast.data.tokens.encode import Encoder, encode
from holdfast.errors import ConfigError, DataError, Interrupted, did_you_mean
from holdfast.models.pretrained import begin_tokens, load_saved_tokenizer, tokenizer_fingerprint
from holdfast.system.files import locked_folder, read_json, require_same
from holdfast.system.interrupt import Interrupt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FORMAT = 1
CHUNK = 2**24  # bytes that verifying reads at a time
ENTRIES = {"dtype": str, "tokens": int, "vocab_size": int, "max_id": int, "tokenizer": str, "sha256": str}


class TokenFile:
    """A folder with ``tokens.bin`` (little-endian uint16 or uint32), ``tokenizer/`` and ``manifest.json``.

    Attributes:
        folder: where it lies.
        manifest: format, dtype, tokens, documents, empty (documents without text, passed over), vocab_size, max_id,
            tokenizer (its fingerprint), domain (name, token and id, or null), sources and how they were read, bytes of
            the source files, SHA-256 of the texts and of ``tokens.bin``.
        vocab_size: ids are below it.
        domain_id: id of the domain's token; None where the file has no domain.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.domain_id: int | None = manifest["domain"]["id"] if manifest["domain"] else None

    @classmethod
    def open(
        cls, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, verify: bool = False
    ) -> TokenFile:
        """Open a token file, in a time that does not depend on its size.

        Args:
            tokenizer: that the file must have been made with; any where absent.
            verify: read the whole file too, see :meth:`verify`.

        Raises:
            ConfigError: there is no such folder.
            DataError: the build is unfinished, the manifest is none or of another format, ``tokens.bin`` is shorter
                or longer than it says, a dtype does not suit, an id is beyond the vocabulary, or the tokenizer is
                another.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise no_path(folder)
        if not (folder / MANIFEST).exists():
            raise unfinished(folder)
        manifest = _manifest(folder / MANIFEST)
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != manifest["tokenizer"]:
            raise DataError(
                f"{folder}: was made with another tokenizer than the one given; make it anew with `holdfast lab tokens`"
            )
        file = cls(folder, manifest)
        if verify:
            file.verify()
        return file

    def __len__(self) -> int:
        """Tokens."""
        return self.manifest["tokens"]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the file was made with, from its copy in the folder."""
        tokenizer: PreTrainedTokenizerFast = load_saved_tokenizer(self.folder / TOKENIZER, DataError)
        return tokenizer

    def rows(self, context: int) -> TokenRows:
        """The file cut into rows of ``context`` tokens; what does not fill a last one is left out.

        Raises:
            DataError: the file is shorter than one row.
        """
        if len(self) < context:
            raise DataError(f"{self.folder}: holds {len(self)} tokens; one row is {context}")
        return TokenRows(self, context)

    def verify(self) -> None:
        """Read all of ``tokens.bin`` and the tokenizer, and compare them with the manifest.

        Raises:
            DataError: an id is beyond the vocabulary, the SHA-256 differs, or the tokenizer's copy is another's.
        """
        path, dtype = self.folder / TOKENS, DTYPES[self.manifest["dtype"]]
        digest, place = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                ids = np.frombuffer(chunk, dtype)
                if ids.max() >= self.vocab_size:
                    raise _beyond(path, int(ids.max()), self.vocab_size, place + int(ids.argmax()))
                place += len(ids)
        if digest.hexdigest() != self.manifest["sha256"]:
            raise DataError(f"{path}: is damaged: its SHA-256 is not that of {MANIFEST}; make it anew")
        if tokenizer_fingerprint(self.tokenizer()) != self.manifest["tokenizer"]:
            raise DataError(f"{self.folder / TOKENIZER}: is another tokenizer than the one that made {TOKENS}")


class TokenRows(Sequence[Mapping[str, Any]]):
    """Rows of a token file, read from its memory map; it can be pickled, for workers of a DataLoader.

    Where the file has a domain, the first token of every row is overwritten by the domain's, as in "Forgetting in
    Language Models" (arXiv 2605.26097), and its label is -100.
    """

    def __init__(self, file: TokenFile, context: int):
        self.context = context
        self.vocab_size = file.vocab_size
        self.domain_id = file.domain_id
        self._path = (file.folder / TOKENS).resolve()
        self._dtype = DTYPES[file.manifest["dtype"]]
        self._count = len(file) // context
        self._map: np.memmap | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """A row, ``input_ids`` and ``labels``: lists of int [context]; a slice gives a list of rows."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        [ids] = self.batch([index]).tolist()
        return {"input_ids": ids, "labels": ids if self.domain_id is None else [IGNORED, *ids[1:]]}

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Several rows: ids, int64 [indices, context].

        Raises:
            IndexError: there is no such row.
            DataError: a token is beyond the vocabulary, so the file is damaged.
        """
        if self._map is None:
            self._map = np.memmap(self._path, self._dtype, "r", shape=(self._count, self.context))
        rows = self._map[np.asarray(indices, np.int64)]
        if rows.size and rows.max() >= self.vocab_size:
            raise _beyond(self._path, int(rows.max()), self.vocab_size)
        ids = torch.from_numpy(rows.astype(np.int64))
        if self.domain_id is not None:
            ids[:, 0] = self.domain_id
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


def build_tokens(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    domain: str | None = None,
    processes: int = 1,
    column: str = "text",
    subset: str | None = None,
    split: str | None = None,
    skip: int = 0,
    documents: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenFile:
    """Tokenise documents into a token file; one that is there already is opened, and an unfinished one continued.

    After each document stands the end-of-sequence token; before it the beginning-of-sequence token, where the
    tokenizer puts one before a text and the file has no domain. A special token that is written in a document stays
    text. The bytes do not depend on the number of processes, nor on how often the build was killed.

    Args:
        sources: files, folders or datasets, as :func:`holdfast.data.texts.read_texts` takes them.
        out: the folder to write.
        tokenizer: a fast one.
        domain: of the documents, whose token ``<|DOMAIN|>`` the tokenizer must have.
        processes: that tokenise; a script that asks for several needs ``if __name__ == "__main__"``.
        column: where a row of a file or dataset has its text.
        subset: configuration name of a dataset.
        split: split of a dataset; train where absent.
        skip: documents that are left out at the front; those without text do not count.
        documents: at most so many; all where absent.
        on_progress: told (documents, tokens) after every part that is written.

    Raises:
        ConfigError: there is no such source or domain, the tokenizer has no end-of-sequence token or is not fast, or
            the folder holds something else.
        DataError: a source cannot be read or has no text, has changed since the build began, or the build is damaged.
        RunDirectoryError: another process uses the folder, or it cannot be written.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    out = Path(out)
    encoder, plan = _plan(tokenizer, domain)
    plan |= {"sources": [str(source) for source in sources]}
    plan |= {"column": column, "subset": subset, "split": split, "skip": skip, "at_most": documents}
    texts = [read_texts(source, column=column, subset=subset, split=split) for source in sources]
    with locked_folder(out), Interrupt() as interrupt:
        if (out / MANIFEST).exists():
            return _finished(out, plan)
        build = Build(out, plan, tokenizer)
        for part, ids in encode(build.parts(chain.from_iterable(texts)), encoder, processes):
            build.append(part, ids)
            if on_progress:
                on_progress(build.done.documents, build.done.tokens)
            if interrupt.requested:
                raise Interrupted(f"{out}: stopped after {build.done.documents} documents, which are saved")
        return TokenFile(out, build.finish())


def _plan(tokenizer: PreTrainedTokenizerBase, domain: str | None) -> tuple[Encoder, dict[str, Any]]:
    """How documents are encoded, and what of it the manifest says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("the tokenizer is slow; one that is read from a tokenizer.json is needed")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer must have an end-of-sequence token (eos_token), which ends every document")
    known = domain_ids(tokenizer)
    if domain is not None and domain not in known:
        raise ConfigError(
            f"domain: the tokenizer has no token {domain_token(domain)}{did_you_mean(domain, known)}; "
            "`holdfast lab tokenizer --domain NAME` makes one"
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    begin = begin_tokens(tokenizer) if domain is None else []
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    return Encoder(backend.to_str(), tuple(begin), (tokenizer.eos_token_id,), DTYPES[dtype].str), {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "domain": None if domain is None else {"name": domain, "token": domain_token(domain), "id": known[domain]},
    }


def _finished(folder: Path, plan: dict[str, Any]) -> TokenFile:
    """The token file that is there already, if it is the one that the plan would make."""
    file = TokenFile.open(folder)
    wanted = plan | {"bytes": source_bytes(plan)}
    if "sources_sha256" in file.manifest:  # version 0.1.0 recorded the size alone
        wanted["sources_sha256"] = source_digest(plan)
    require_same(folder, "a token file", file.manifest, wanted)
    (folder / JOURNAL).unlink(missing_ok=True)
    return file


def _manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, and compare it with itself and with the size of the tokens beside it."""
    try:
        manifest = read_json(path)
        form = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no manifest of a token file") from None
    if form != FORMAT:
        raise DataError(f"{path}: is of format {form!r}; this version of holdfast reads format {FORMAT}")
    for key, kind in ENTRIES.items():
        if not isinstance(manifest.get(key), kind):
            raise DataError(f"{path}: {key}: must be of type {kind.__name__}, not {manifest.get(key)!r}")
    name, vocab_size = manifest["dtype"], manifest["vocab_size"]
    if name not in DTYPES:
        raise DataError(f"{path}: dtype: must be {' or '.join(DTYPES)}, not {name!r}")
    dtype = DTYPES[name]
    if vocab_size > 2 ** (8 * dtype.itemsize):
        raise DataError(f"{path}: dtype: {name} is too small for a vocabulary of {vocab_size}")
    tokens = path.parent / TOKENS
    if manifest["max_id"] >= vocab_size:
        raise _beyond(tokens, manifest["max_id"], vocab_size)
    if "domain" not in manifest:
        raise DataError(f"{path}: domain: is missing; null stands for none")
    domain = manifest["domain"]
    if domain is not None and not (isinstance(domain, dict) and type(domain.get("id")) is int):
        raise DataError(f"{path}: domain: must be null, or an object with name, token and id, not {domain!r}")
    if domain is not None and not 0 <= domain["id"] < vocab_size:
        raise DataError(f"{path}: domain: the id {domain['id']} is beyond the vocabulary of {vocab_size} tokens")
    if not tokens.exists():
        raise DataError(f"{tokens}: is missing; make it anew")
    size, wanted = tokens.stat().st_size, manifest["tokens"] * dtype.itemsize
    if size != wanted:
        state = "truncated" if size < wanted else "longer than it should be"
        raise DataError(
            f"{tokens}: is {state}, or of another dtype: it has {size} bytes, but {manifest['tokens']} tokens of "
            f"{name} take {wanted}; make it anew"
        )
    return manifest


def _beyond(path: Path, token: int, vocab_size: int, place: int | None = None) -> DataError:
    at = "" if place is None else f" (token {place})"
    return DataError(
        f"{path}: holds the id {token}{at}, beyond the vocabulary of {vocab_size} tokens: it is damaged, or of another "
        "dtype or tokenizer"
    )
