"""The toy tasks: their rows are right, and accuracy is that of greedy decoding."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from holdfast.data.tokens.file import TokenFile
from holdfast.lab import arithmetic
from holdfast.lab.sources import Arithmetic
from holdfast.models.sampling import sample
from holdfast.rehearsal.request import Request, SampleOptions
from support.tiny import tiny_model


@pytest.mark.parametrize("task", arithmetic.TASKS)
def test_every_row_is_right_and_of_one_length(task):
    for text in arithmetic.rows(task, 3, 200, seed=4):
        assert len(text) + 1 == arithmetic.row_length(3)  # and the end
        assert text.index("=") + 1 == arithmetic.prompt_length(3)
        a, _, rest = text[1:].partition("+")
        b, _, answer = rest.partition("=")
        right = {
            "add": lambda a=a, b=b: int(a) + int(b),
            "modadd": lambda a=a, b=b: (int(a) + int(b)) % 1000,
            "reversal": lambda a=a: int(a[::-1]),
            "sort": lambda a=a: int("".join(sorted(a))),
        }[task]()
        assert answer == f"{right:04d}"


def test_token_files_hold_a_row_a_sequence_under_the_task_s_token(tmp_path):
    files = Arithmetic(digits=2, rows=30, test_rows=10).prepare(tmp_path)
    assert set(files) == set(Arithmetic().names())
    for task in arithmetic.TASKS:
        file = TokenFile.open(files[task])
        rows = file.rows(arithmetic.row_length(2))
        assert len(rows) == 30
        words = [file.tokenizer().convert_ids_to_tokens(row) for row in rows.batch(range(30)).tolist()]
        assert {row[0] for row in words} == {f"<|{task}|>"}
        assert {row[-1] for row in words} == {"</s>"}
        assert ["".join(row[1:-1]) for row in words] == [row[1:] for row in arithmetic.rows(task, 2, 30, seed=0)]
    assert Arithmetic().vocabulary() == len(TokenFile.open(files["add"]).tokenizer())


def test_samples_of_several_tasks_are_asked_for_in_turn():
    tokenizer = arithmetic.arithmetic_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    request = Request.of(tokenizer, 64, options=SampleOptions(length=11, domain=["sort", "add"]))
    rows = [own.row for own in request.write(partial(sample, model), "seed", range(5))]
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"][0]) for row in rows]
    assert words == ["<|sort|>", "<|add|>"] * 2 + ["<|sort|>"]
    assert all(len(row["input_ids"]) == 11 and row["labels"] == [-100, *row["input_ids"][1:]] for row in rows)
    later = request.write(partial(sample, model), "seed", [3])  # a sample depends on its number alone
    assert later[0].row == rows[3]


class Writer:
    """Answers rows by rote; where it errs once, its next token would be right given the right answer so far."""

    def __init__(self, ids, wrong):
        self.ids, self.wrong = ids, wrong

    def eval(self):
        pass

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 20)
        for i, row in enumerate(input_ids):
            known = next(j for j, ids in enumerate(self.ids) if torch.equal(ids[:4], row[:4]))
            place = len(row)
            logits[i, -1, 0 if (known, place) in self.wrong else self.ids[known, place]] = 1
        return SimpleNamespace(logits=logits)


def test_one_wrong_token_spoils_the_whole_answer():
    ids = torch.arange(1, 12).repeat(4, 1)
    ids[:, 1] = torch.arange(1, 5)  # digits 2: rows of 11, prompts of 7
    assert arithmetic.exact_match(Writer(ids, set()), ids, 2) == 1.0
    assert arithmetic.exact_match(Writer(ids, {(0, 7), (2, 10)}), ids, 2, batch_size=3) == 0.5
