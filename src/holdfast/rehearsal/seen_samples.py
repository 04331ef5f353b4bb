"""General samples that show pictures: rows of questions about pictures, of which the answers are supervised."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.encode_seen import SeeingEncoder
from holdfast.data.files import iterate_rows, suffix
from holdfast.data.formats import detect, to_examples
from holdfast.data.row_pictures import shows_pictures
from holdfast.data.source import renamed
from holdfast.data.texts import text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.models.sight import Sight

logger = logging.getLogger("holdfast")


def seen_rows(
    path: str, tokenizer: PreTrainedTokenizerBase, sight: Sight, *, samples: int, max_tokens: int, seed: int
) -> list[dict[str, Any]] | None:
    """Tokenise a random choice of the rows of files whose first row shows a picture; other files hold texts.

    The rows are of any format of a task but text, and become what those of a task become. Only pictures of chosen rows
    are read. The chosen rows keep their order.

    Args:
        path: a data file, or a folder of such files.
        tokenizer: the model's; with a chat template, rows are chats.
        sight: how the model sees.
        samples: rows to choose; all if there are fewer.
        max_tokens: tokens of a row at most; a longer one loses the middle of its question, never a picture.
        seed: of the choice.

    Returns:
        one row a sample: ``input_ids`` and ``labels``, lists of int of equal length; None where the first row shows no
        picture.

    Raises:
        ConfigError: there is no such path.
        DataError: a file cannot be read, a row is of no format of a task, or a picture cannot be used.
    """
    files = [file for file in text_files(Path(path)) if suffix(file) != ".txt"]
    first = next(iter(iterate_rows(files[0])), None) if files else None
    if first is None or not shows_pictures(first):
        return None
    read = [(file, row) for file in files for row in iterate_rows(file)]
    chance = random.Random(f"{seed}/general samples")
    chosen = sorted(chance.sample(range(len(read)), min(samples, len(read))))
    encoder = SeeingEncoder(tokenizer, sight=sight, max_length=max_tokens)
    rows = []
    for file, row in (read[place] for place in chosen):
        format, names = detect([row], file)
        for example in to_examples([renamed(row, names, "") if names else row], format, file=file):
            rows += [{key: one[key] for key in ("input_ids", "labels")} for one in encoder.encode(example)]
    logger.info("%s: %d general samples with pictures (%d asked for)", path, len(rows), samples)
    return rows
