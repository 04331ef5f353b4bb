"""Rehearsal samples from outside the tasks: general text, and a corpus that the model wrote itself."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.api.rows import IGNORED, TOKENS, TokenRow, bare
from holdfast.api.stage import Encode
from holdfast.data.files import read_rows, suffix, where
from holdfast.data.texts import SeenRow, dataset_texts, file_documents, row_text, task_examples, text_files
from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import begin_tokens
from holdfast.rehearsal.corpus import corpus_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 10  # of a dataset, which may be endless, this many texts are read for each one that is chosen

logger = logging.getLogger("holdfast")


def general_rows(
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str | None = None,
    texts: Iterable[str] | None = None,
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    column: str = "text",
    samples: int = 1000,
    max_tokens: int = 563,
    seed: int = 0,
    encode: Encode | None = None,
    no_text: str | None = None,
) -> list[dict[str, Any]]:
    """Tokenise a random choice of general texts. GeRe's defaults: 1,000 documents, the first 563 tokens of each.

    Exactly one of ``path``, ``texts`` and ``dataset`` is given. Texts of fewer than two tokens are skipped, since
    nothing in them can be predicted. The chosen texts keep their order, so the seed makes no difference where there are
    no more than ``samples``. Rows of a file that show pictures are rows of a task: prompt and answer, and what is
    supervised of them, are those that ``encode`` makes.

    Args:
        tokenizer: the model's; the call does not change it.
        path: a .txt file (one text a line), a .jsonl, .json, .csv or .parquet file, or a folder of such files.
        texts: the texts themselves.
        dataset: name of a Hugging Face dataset, which is streamed, or a local folder of one; the choice is among its
            first ``10 * samples`` texts.
        subset: configuration name of the dataset.
        split: split of the dataset.
        column: the column of a file or dataset that holds the text.
        samples: texts to choose; all if there are fewer.
        max_tokens: tokens of a row at most, from the beginning of its text, including a beginning-of-sequence token if
            the tokenizer adds one; rows with pictures are as long as ``encode`` makes them.
        seed: of the choice.
        encode: makes rows of examples that show pictures; None: such a row is refused.
        no_text: a token that stands for no text, as that of pictures. A text that has its name is written without any
            special token.

    Returns:
        one row a text: ``input_ids`` and ``labels``, lists of int of equal length; all tokens of a text but a
        beginning-of-sequence token are supervised.

    Raises:
        ConfigError: not exactly one source is given, or there is no such path.
        DataError: a file or dataset cannot be read, a row lacks the column or has no text in it, or no text reaches
            two tokens.
    """
    if sum(given is not None for given in (path, texts, dataset)) != 1:
        raise ConfigError("general samples: give one of path (a file or folder), dataset (of Hugging Face) and texts")
    if dataset is not None:
        source = f"dataset {dataset}"
        read: list[str | SeenRow] = list(
            itertools.islice(dataset_texts(dataset, subset, split, column), POOL * samples)
        )
    elif path is not None:
        source, read = path, [one for file in text_files(Path(path)) for one in file_documents(file, column)]
    else:
        source, read = "general samples", list(texts or ())
    full = [one for one in read if isinstance(one, SeenRow) or one.strip()]
    if not full:
        raise DataError(f"{source}: holds no text to take general samples from")

    chosen: dict[int, dict[str, Any]] = {}
    order = iter(random.Random(f"{seed}/general samples").sample(range(len(full)), len(full)))
    while part := list(itertools.islice(order, samples - len(chosen))):
        tokenised = _of_documents(tokenizer, [full[place] for place in part], max_tokens, encode, no_text)
        chosen |= {place: row for place, row in zip(part, tokenised, strict=True) if len(row["input_ids"]) > 1}
    if not chosen:
        raise DataError(
            f"{source}: each of its {len(full)} texts is shorter than two tokens, so there is nothing to predict; "
            "general samples need longer ones"
        )
    tokens = sum(len(row["input_ids"]) for row in chosen.values())
    logger.info("%s: %d general samples (%d asked for), %d tokens", source, len(chosen), samples, tokens)
    return [chosen[place] for place in sorted(chosen)]


def corpus_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, context: int | None = None
) -> list[dict[str, Any]]:
    """Read a corpus that a model wrote, each sample as a whole.

    Args:
        path: a folder of :func:`holdfast.rehearsal.corpus.write_corpus`; or a .jsonl file with rows of ``text``, or of
            ``input_ids`` and, if not all tokens are supervised, ``labels`` (-100 where not).
        tokenizer: the model's; needed where the rows are texts.
        context: tokens that the model reads at most; where absent, any number.

    Returns:
        one row a line: ``input_ids`` and ``labels``, lists of int of equal length.

    Raises:
        ConfigError: there is no such file, or it holds texts and no tokenizer is given.
        DataError: a row is malformed, longer than the context, or supervises no token; the folder is unfinished,
            damaged or of another tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"self-generated corpus: there is no file or folder {str(path)!r} (looked from {Path.cwd()})")
    files = corpus_files(path, tokenizer) if path.is_dir() else [path]
    rows = []
    for shard, index, row in ((file, index, row) for file in files for index, row in enumerate(read_rows(file))):
        place = where(shard, index, row)
        if "input_ids" in row:
            rows.append(_checked(row, place))
        elif "text" in row:
            if tokenizer is None:
                raise ConfigError(f"{path}: holds texts, so a tokenizer is needed; rows of input_ids need none")
            rows += _tokenised(tokenizer, [row_text(row, "text", place)], max_tokens=None)
        else:
            keys = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{place}: must have input_ids (or text) of one sample; its keys: {keys}")
        if all(label == IGNORED for label in rows[-1]["labels"][1:]):
            raise DataError(
                f"{place}: nothing to predict in it; a sample needs two tokens, and a label after the first"
            )
        if context is not None and len(rows[-1]["input_ids"]) > context:
            raise DataError(
                f"{place}: has {len(rows[-1]['input_ids'])} tokens, more than the model's context of {context}, so the "
                "model did not write it; long texts of others are general text, of which the first tokens are taken"
            )
    return rows


def prompted_rows(path: str, encode: Encode) -> list[TokenRow]:
    """The rows of a file or folder whose prompts are to be answered, as a task's rows.

    Raises:
        ConfigError: there is no such path.
        DataError: a file holds no rows with prompts, or a row cannot be used.
    """
    rows = list[TokenRow]()
    for file in text_files(Path(path)):
        if suffix(file) == ".txt":
            raise DataError(f"{file}: holds texts, which ask nothing; prompts are those of rows with prompt and answer")
        for index, row in enumerate(read_rows(file)):
            for example in task_examples(row, file, index):
                if not example.turns:
                    raise DataError(f"{where(file, index, row)}: is a text, which asks nothing; give prompt and answer")
                rows.append(bare(encode([example])[-1]))
    return rows


def rows_fingerprint(rows: Sequence[TokenRow]) -> str:
    """SHA-256 (hexadecimal) over the tokens and labels of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for key in (key for key in TOKENS if key in row):
            values = np.asarray(row[key], dtype="<i8")
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(values.tobytes())
    return digest.hexdigest()


def _of_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str | SeenRow],
    max_tokens: int,
    encode: Encode | None,
    no_text: str | None,
) -> list[dict[str, Any]]:
    """Rows of texts, and of rows of a task, whose last answer is asked for; those without one have no tokens."""
    texts = [one for one in documents if isinstance(one, str)]
    tokenised = iter(_tokenised(tokenizer, texts, max_tokens, no_text) if texts else ())
    rows = []
    for one in documents:
        if isinstance(one, str):
            rows.append(next(tokenised))
        elif encode is None:
            raise ConfigError(
                f"{where(one.file, one.place)}: shows a picture, and only `holdfast run` knows how the model reads it; "
                "give texts"
            )
        else:
            found = [bare(row) for row in encode(task_examples(*one))]
            rows.append(found[-1] if found else {"input_ids": [], "labels": []})
    return rows


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int | None, no_text: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the texts' first tokens, after a beginning-of-sequence token if the tokenizer adds one."""
    begin = begin_tokens(tokenizer)
    rows = []
    whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for place, text in enumerate(texts):
        if no_text is not None and no_text in text:
            whole[place] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for tokens in whole:
        ids = (begin + tokens)[:max_tokens]
        rows.append({"input_ids": ids, "labels": [IGNORED] * len(begin) + ids[len(begin) :]})
    return rows


def _checked(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row of tokens; DataError if it is malformed."""
    ids = row["input_ids"]
    labels = row.get("labels", ids)
    for key, values, signs in (("input_ids", ids, ()), ("labels", labels, (IGNORED,))):
        if not isinstance(values, list) or not all(type(v) is int and (v >= 0 or v in signs) for v in values):
            raise DataError(f"{place}: {key}: must be a list of token numbers, not {values!r:.40}")
    if len(labels) != len(ids):
        raise DataError(f"{place}: labels: has {len(labels)} entries, but input_ids {len(ids)}; one a token is needed")
    return {"input_ids": ids, "labels": list(labels)}
