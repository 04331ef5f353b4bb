"""Toy tasks on n-digit numbers: rows for token files, each task with a domain token, and the accuracy of a model."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from holdfast.data.tokens.domains import domain_token

TASKS = ("add", "reversal", "sort", "modadd")
MODULUS = 10  # modadd is modulo this to the power of the digits


def signs() -> list[str]:
    """The vocabulary: padding, end, the domain token of each task, digits and signs."""
    return ["<pad>", "</s>", *(domain_token(task) for task in TASKS), *"0123456789", "+", "_", "="]


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are :func:`signs`."""
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs())}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=[domain_token(task) for task in TASKS],
        clean_up_tokenization_spaces=False,
    )


def row_length(digits: int) -> int:
    """Tokens of a row: domain token, number, +, number, =, answer of one digit more, end."""
    return 3 * digits + 5


def prompt_length(digits: int) -> int:
    """Tokens of a row up to its ``=``."""
    return 2 * digits + 3


def rows(task: str, digits: int, count: int, seed: int) -> list[str]:
    """Make rows of a task, without the end token; with it, each has :func:`row_length` tokens.

    ``add``: the sum of two numbers; ``modadd``: the same modulo 10^digits; ``reversal`` and ``sort``: the digits of one
    number in reverse and in ascending order, with ``_`` in the place of a second number. Answers have leading zeros.
    The first sign is a ``_``, which a token file replaces with the domain token.
    """
    draw = random.Random(f"{task}/{digits}/{seed}")
    texts = []
    for _ in range(count):
        a, b = (draw.randrange(MODULUS**digits) for _ in range(2))
        first = f"{a:0{digits}d}"
        second = f"{b:0{digits}d}" if task in ("add", "modadd") else "_" * digits
        match task:
            case "add":
                answer = str(a + b)
            case "modadd":
                answer = str((a + b) % MODULUS**digits)
            case "reversal":
                answer = first[::-1]
            case _:
                answer = "".join(sorted(first))
        texts.append(f"_{first}+{second}={answer.zfill(digits + 1)}")
    return texts


@torch.no_grad()
def exact_match(model: Any, ids: Tensor, digits: int, batch_size: int = 1024) -> float:
    """Share of rows for which greedy decoding after the ``=`` gives the whole answer and the end token.

    Args:
        model: a causal language model.
        ids: rows ``[rows, row_length(digits)]``, int64.
    """
    model.eval()
    start, right = prompt_length(digits), 0
    for batch in ids.split(batch_size):
        written = batch[:, :start]
        while written.shape[1] < batch.shape[1]:
            written = torch.cat([written, model(input_ids=written).logits[:, -1].argmax(-1, keepdim=True)], 1)
        right += int((written == batch).all(1).sum())
    return right / len(ids)
