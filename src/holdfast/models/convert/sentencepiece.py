"""A SentencePiece BPE model (tokenizer.model) as a fast tokenizer, without sentencepiece and protobuf."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import DataError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

SPACE = "\u2581"  # SentencePiece's sign for a space

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """An entry of the vocabulary; its position is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a tokenizer.model that decide how text becomes ids (sentencepiece_model.proto)."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    unknown: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        DataError: the file is absent or no SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; the checkpoint's SentencePiece model is needed") from None
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (dict(_fields(_last(fields, number))) for number in (2, 3))
        charsmap = normalizer.get(2, b"")
        assert isinstance(charsmap, bytes)
        model = SentencePieceModel(
            pieces=pieces,
            model_type=int(trainer.get(3, 1)),
            byte_fallback=bool(trainer.get(35, 0)),
            unknown=int(trainer.get(40, 0)),
            charsmap=charsmap,
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        )
    except (ValueError, IndexError, struct.error):
        model = None
    if model is None or not model.pieces:
        raise DataError(f"{path}: is not a SentencePiece model; was it downloaded whole, and not as a Git LFS pointer?")
    return model


def fast_tokenizer(model: SentencePieceModel, added: dict[int, AddedToken], path: Path) -> Tokenizer:
    """A tokenizer that gives a text the same ids as SentencePiece, except for added tokens, which it finds in text.

    Args:
        model: a BPE model.
        added: further tokens by id, in the place of a piece or after the last one. Control pieces always are added
            tokens.
        path: the model's file, for messages.

    Raises:
        DataError: the model is no BPE model, or no plain tokenizer equals it, or an added token cannot have its id.
    """
    from tokenizers import AddedToken, Tokenizer, models

    if model.model_type != BPE:
        raise DataError(f"{path}: is not a BPE model; only these can be converted")
    users = [i for i, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED and i not in added]
    if users and model.add_dummy_prefix:
        raise DataError(
            f"{path}: puts a space before every text and has user-defined pieces, such as "
            f"{model.pieces[users[0]].text!r}; no plain tokenizer does both as SentencePiece does"
        )
    texts = [added[i].content if i in added else piece.text for i, piece in enumerate(model.pieces)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=_merges(model, added),
            unk_token=texts[model.unknown],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    controls = (i for i, piece in enumerate(model.pieces) if piece.kind == CONTROL)
    # SentencePiece looks for user-defined pieces in the normalised text, where a space is SPACE.
    tokens = {i: AddedToken(texts[i], normalized=True, special=False) for i in users}
    tokens |= {i: AddedToken(texts[i], normalized=False, special=True) for i in controls} | added
    tokenizer.add_tokens([tokens[i] for i in sorted(tokens)])
    for i, token in tokens.items():
        if tokenizer.token_to_id(token.content) != i:
            raise DataError(
                f"{path}: the added token {token.content!r} cannot have the id {i}; ids of added tokens must replace "
                f"pieces or go on from {len(texts)} without a gap, and no two tokens may be alike"
            )
    return tokenizer


def _merges(model: SentencePieceModel, added: dict[int, AddedToken]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the best score first, which is SentencePiece's order."""
    mergeable = {p.text: (-p.score, i) for i, p in enumerate(model.pieces) if p.kind == NORMAL and i not in added}
    merges = [
        (rank, cut, text[:cut], text[cut:])
        for text, rank in mergeable.items()
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    from tokenizers import decoders

    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


# --- protobuf's wire format ---


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) in order; fixed-size and length-delimited values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: int | bytes
        match key & 7:
            case 0:
                value, at = _varint(data, at)
            case 1 | 2 | 5 as wire:
                size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
                value, at = data[at : at + size], at + size
                if len(value) < size:
                    raise IndexError("cut off")
            case wire:
                raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _last(fields: list[tuple[int, int | bytes]], number: int) -> bytes:
    values = [value for n, value in fields if n == number]
    return values[-1] if values and isinstance(values[-1], bytes) else b""


def _piece(data: int | bytes) -> Piece:
    if not isinstance(data, bytes):
        raise ValueError("a piece is a message")
    values = dict(_fields(data))
    text, score = values[1], values.get(2, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece has a text and a score")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], int(values.get(3, NORMAL)))
