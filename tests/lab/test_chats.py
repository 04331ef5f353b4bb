"""The small instruction-tuned world, and what is taken of the paper's datasets."""

import json

import pytest

from holdfast.api.task import Example, Turn
from holdfast.data.encode import Encoder
from holdfast.data.files import read_rows
from holdfast.data.tokens.file import TokenFile
from holdfast.lab.chats import measure_chats
from holdfast.lab.results import score_columns
from holdfast.lab.sources import Chats
from holdfast.lab.verilog import pairs, question
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Chats(size=10, rows=50, vocab_size=600).prepare(tmp_path_factory.mktemp("chats"))


def test_the_world_is_asked_in_training_and_in_other_words(files):
    assert set(files) == set(Chats().names())
    parts = (read_rows(files["chats"] / f"{part}.jsonl") for part in ("train", "test"))
    train, test = ({row["prompt"]: row["answer"] for row in rows} for rows in parts)
    assert not set(train) & set(test)
    assert set(test.values()) <= set(train.values())
    questions = read_rows(files["choices"])
    assert {row["question"]: row["choices"][row["answer"]] for row in questions} == test
    programs = read_rows(files["circuits"] / "train.jsonl"), read_rows(files["circuits"] / "test.jsonl")
    assert [len(part) for part in programs] == [50, 10]
    assert not {row["prompt"] for row in programs[0]} & {row["prompt"] for row in programs[1]}


def test_the_tokenizer_s_template_ends_every_turn(files):
    tokenizer = TokenFile.open(files["text"]).tokenizer()
    encoder = Encoder(tokenizer, max_length=64, template="chat")
    [row] = encoder.encode(Example("a", 0, (Turn("user", "Who?"), Turn("assistant", "Zoro"))))
    assert tokenizer.decode(row["input_ids"]) == "<s>Q: Who?</s>A: Zoro</s>"
    answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(answer) == " Zoro</s>"


def test_chat_loss_is_that_of_a_uniform_guess_for_a_model_that_knows_nothing(files, tmp_path):
    tokenizer = TokenFile.open(files["text"]).tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert measure_chats(tmp_path, files["chats"])["chat_loss"] == pytest.approx(6.397, abs=0.01)  # ln 600


def test_programs_that_do_not_compile_or_say_nothing_are_passed_over():
    def row(code="module a;\nendmodule", **about):
        said = {"description": "an empty module that does nothing", "compile_status": "No error!"} | about
        return {"description": json.dumps(said), "code": code}

    good = row()
    bad = [
        row(compile_status="Syntax error"), row(description="short"), row(description=None), row(code="['module']"),
        row(code="module a;"), row(code="module a;\\nendmodule"), row(code=None), {"description": "none", "code": ""},
    ]  # fmt: skip
    assert list(pairs([*bad, good])) == [
        ("Write the following Verilog program. an empty module that does nothing", "module a;\nendmodule")
    ]


def test_questions_of_three_datasets_become_one_shape():
    mmlu = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "subject": "arithmetic"}
    arc = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B", "id": "x"}
    assert question(mmlu) == question(arc) == {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def test_scores_of_a_run_become_columns():
    matrix = {
        "tasks": ["verilog"], "metrics": {"verilog": "loss"}, "scores": [[2.0], [0.5]],
        "general": {"mmlu": [0.5, 0.4], "arc": [0.3, 0.3], "perplexity/web": [1.0, 2.718281828]},
    }  # fmt: skip
    assert score_columns(matrix) == pytest.approx(
        {"verilog_start": 2.0, "verilog_loss": 0.5, "mmlu_start": 0.5, "mmlu": 0.4, "arc_start": 0.3, "arc": 0.3}
        | {"web_start": 0.0, "web_loss": 1.0, "choices_start": 0.4, "choices": 0.35, "choices_lost": 0.05}
    )
