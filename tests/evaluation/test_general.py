"""General abilities from local files: choices by answer and by letter, few-shot prompts, refusals, GeRe's summary."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from holdfast.api.task import PICTURE, General, Stream
from holdfast.config.evaluation import GeneralConfig
from holdfast.config.model import ModelConfig
from holdfast.data.encode import Encoder
from holdfast.data.encode_apart import encoder_of
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.abilities import load_general
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import choice_records, choices_chance, encode_choices, general_statistics
from holdfast.evaluation.respond import sequence_losses
from holdfast.metrics.summary import harmonic_mean, summarize
from holdfast.models.pictures import look_at, pictures_in
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sight import callable_with_pictures, load_sight
from holdfast.models.weights import load_language_model
from holdfast.records.read import read_run
from holdfast.runner.run import run
from holdfast.scoring.refusal import is_refusal
from holdfast.system.files import read_jsonl
from holdfast.system.progress import Progress
from support.paths import SHARED
from support.sight import write_pictures, write_seeing
from support.tiny import tiny_config, tiny_model, tiny_tokenizer

DATA = SHARED / "data"
TRUE_FALSE = {
    "instruction": "is it?\n\nAnswer format: true/false",
    "input": "",
    "output": "",
    "answer": "",
}


def load(path: Path, **config: Any) -> General:
    config = {"name": "g", "path": str(path), "kind": "choices"} | config
    return load_general([GeneralConfig.model_validate(config)], Stream("s", []))[0]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(question: str, answer: int, subject: str = "high_school_logic") -> dict[str, Any]:
    return {"subject": subject, "question": question, "choices": ["one", "two", "three", "four"], "answer": answer}


# --- pictures ---


def test_choices_are_weighed_with_the_picture_of_their_question(tmp_path):
    config = ModelConfig(name=str(write_seeing(tmp_path / "model")))
    tokenizer, model_config = load_tokenizer(config), load_model_config(config)
    sight = load_sight(config, model_config, tokenizer)
    model = callable_with_pictures(load_language_model(tmp_path / "model").eval(), sight)
    pictures = [look_at(tmp_path / name) for name in write_pictures(tmp_path, 2)]
    measure = General(
        "g", "choices", questions=[(f"{PICTURE}what?", ["a", "b"], 0)] * 2, pictures=[(one,) for one in pictures]
    )
    evaluation = ModelEvaluation(model, encoder_of(model_config, tokenizer, sight, max_length=64), batch_size=4)
    encoded = encode_choices(evaluation.encoder, measure)
    shown = [pictures_in(row["input_ids"]) for rows in encoded for row in rows]
    assert shown == [[picture] for picture in pictures for _ in range(2)]
    losses, _ = sequence_losses(evaluation, encoded)
    assert abs(losses[0] - losses[2]) > 1e-3 and abs(losses[1] - losses[3]) > 1e-3


# --- files ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"ctx": "a man", "endings": ["runs", "eats", "is", "has"], "label": "2"}, ("a man", 4, 2)),
        ({"ctx": "a man", "endings": ["runs", "eats"], "label": 0}, ("a man", 2, 0)),
        (TRUE_FALSE | {"answer": "false"}, (TRUE_FALSE["instruction"], 2, 1)),
        (TRUE_FALSE | {"answer": "true", "input": "it"}, (TRUE_FALSE["instruction"] + "\nit", 2, 0)),
    ],
)
def test_a_row_tells_its_shape(tmp_path: Path, row: dict[str, Any], expected: tuple[str, int, int]) -> None:
    [(question, choices, right)] = load(write(tmp_path / "a.jsonl", [row])).questions
    assert (question, len(choices), right) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ctx": "a man", "endings": ["runs", "eats"], "label": ""}, "label: '' names no choice"),
        ({"ctx": "a man", "endings": "runs", "label": 0}, "endings: must be a list"),
        ({"endings": ["runs", "eats"], "label": 0}, "ctx: must be text"),
        (TRUE_FALSE | {"answer": "maybe"}, "answer: 'maybe' names no choice"),
        (TRUE_FALSE | {"instruction": "is it?", "answer": "true"}, "instruction: must end with the answers"),
        (TRUE_FALSE | {"instruction": 7, "answer": "true"}, "instruction and input: must be texts"),
        ({"text": "a"}, "question: must be text; found the keys 'text'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    good = {"ctx": "a man", "endings": ["runs", "eats"], "label": 0}
    with pytest.raises(DataError, match=rf"a\.jsonl: row 2 \(line 2\): {said}"):
        load(write(tmp_path / "a.jsonl", [good, row]))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_real_files() -> None:
    for name, options, count in (("ARC-Easy", {3, 4}, 300), ("boolq", {2}, 300)):
        questions = load(DATA / "multiple_choice" / name / "test.jsonl").questions
        assert len(questions) == count and {len(choices) for _, choices, _ in questions} == options
    dev = str(DATA / "mmlu" / "dev.jsonl")
    mmlu = load(DATA / "mmlu" / "test.jsonl", by="letter", shots=5, demonstrations=dev)
    assert len(mmlu.questions) == 57 * 20
    assert all(len(pieces) == 6 for pieces in mmlu.shown)


@pytest.mark.parametrize("by", ["acc", "acc_norm", "acc_bytes"])
def test_likelihoods_are_divided_by_the_choice(by: str) -> None:
    """The pick of a plain loop over tokens, divided by 1, characters or bytes."""
    chance = random.Random(1)
    tokenizer, model = tiny_tokenizer(), tiny_model(initializer_range=0.5)
    evaluation = ModelEvaluation(model, Encoder(tokenizer, max_length=64, template="plain"), batch_size=4)
    length = {"acc": lambda _: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}[by]
    questions = []
    for _ in range(24):
        choices = [first + "".join(chance.choices("abcdé", k=chance.randint(1, 6))) for first in "efg"]
        values = []
        for choice in choices:
            before = tokenizer("why?", add_special_tokens=False)["input_ids"]
            ids = before + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values.append(sum(float(logs[k - 1, ids[k]]) for k in range(len(before), len(ids))) / length(choice))
        questions.append(("why?", choices, values.index(max(values))))
    measure = General("g", "choices", questions=questions, by=by)  # type: ignore[arg-type]
    chosen: dict[str, list[int]] = {}
    assert general_statistics(evaluation, [measure], chosen=chosen)["g"].tolist() == [[1, 1]] * 24
    records = choice_records(measure, chosen["g"])
    assert [(r["prompt"], r["answer"], r["score"]) for r in records] == [(q, c[right], 1) for q, c, right in questions]
    assert all(record["response"] == record["answer"] for record in records)


def test_chance_is_what_guesses_or_the_commonest_answer_get() -> None:
    def chance(right: list[int], choices: list[str]) -> float:
        return choices_chance(General("g", "choices", questions=[("?", choices, answer) for answer in right]))

    assert chance([0, 0, 1], ["true", "false"]) == pytest.approx(2 / 3)
    assert chance([0, 1], ["true", "false"]) == 0.5
    own = [("?", [f"{k}{choice}" for choice in "abcd"], 0) for k in range(5)]
    assert choices_chance(General("g", "choices", questions=own)) == 0.25


# --- by letter ---


def test_the_prompt_of_mmlu(tmp_path: Path) -> None:
    dev = [asked("first?", 1), asked("other?", 0, "law"), asked("second?", 3), asked("third?", 0)]
    found = load(
        write(tmp_path / "test.jsonl", [asked("which?", 2)]),
        by="letter",
        shots=2,
        demonstrations=str(write(tmp_path / "dev.jsonl", dev)),
    )
    options = "\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert found.questions == [(f"which?{options}", ["A", "B", "C", "D"], 2)]
    assert found.shown == [
        [
            "The following are multiple choice questions (with answers) about high school logic.\n\n",
            f"first?{options} B\n\n",
            f"second?{options} D\n\n",
        ]
    ]


def test_too_few_demonstrations_and_questions_without_letters(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [asked("a?", 0), asked("b?", 0, "law")])
    dev = write(tmp_path / "dev.jsonl", [asked("c?", 1)])
    with pytest.raises(DataError, match=r"test\.jsonl: row 2 .*dev\.jsonl holds 0 demonstrations of 'law', not the 1"):
        load(test, by="letter", shots=1, demonstrations=str(dev))
    with pytest.raises(DataError, match=r"row 1 .*instruction: names its own answers \(true/false\).*answers: texts"):
        load(write(tmp_path / "boolq.jsonl", [TRUE_FALSE | {"answer": "true"}]), by="letter")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "perplexity", "by": "letter"}, "by: letter is for kind choices"),
        ({"kind": "refusals", "by": "acc_with_end"}, "by: acc_with_end is for kind choices"),
        ({"kind": "perplexity", "by": "acc_norm"}, "by: acc_norm is for kind choices"),
        ({"kind": "refusals", "answers": "texts"}, "answers: texts is for kind choices"),
        ({"shots": 5, "demonstrations": "dev.jsonl"}, "shots: needs by: letter"),
        ({"shots": 5, "by": "letter"}, "shots: needs by: letter, and the questions to show"),
        ({"by": "letter", "demonstrations": "dev.jsonl"}, "demonstrations: needs shots"),
    ],
)
def test_settings_that_do_not_go_together(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GeneralConfig.model_validate({"name": "g", "path": "a.jsonl", "kind": "choices"} | config)


def test_what_version_0_1_called_answer_keeps_its_meaning():
    """0.1.0 recorded by: answer for every kind; of choices it counts the end of the answer."""
    old = {"name": "g", "path": "a.jsonl", "by": "answer"}
    assert GeneralConfig.model_validate(old | {"kind": "choices"}).by == "acc_with_end"
    assert GeneralConfig.model_validate(old | {"kind": "perplexity"}).by == "acc"
    assert GeneralConfig.model_validate(old | {"kind": "lm_eval", "path": "", "tasks": ["arc"]}).by == "acc"
    assert GeneralConfig(name="g", path="a.jsonl", kind="choices").by == "acc"


def lettered(max_length: int) -> ModelEvaluation:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list("ABCD"))
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    return ModelEvaluation(model, Encoder(tokenizer, max_length=max_length), batch_size=3)


def test_the_likeliest_letter_is_that_of_the_next_token_and_demonstrations_that_do_not_fit_are_left_out(
    tmp_path: Path,
) -> None:
    rows = [asked(question, 0) for question in ("what is it?", "is it so?", "why?", "when was that?")]
    path, dev = write(tmp_path / "test.jsonl", rows), write(tmp_path / "dev.jsonl", rows)
    for max_length, kept in ((512, 3), (210, 2)):  # the heading has 84 tokens, a question with its letters 40 or so
        evaluation = lettered(max_length)
        measure = load(path, by="letter", shots=2, demonstrations=str(dev))
        nats = []
        for (question, letters, _), pieces in zip(measure.questions, measure.shown, strict=True):
            text = "".join(pieces[:kept]) + question + " "
            ids = [evaluation.encoder.tokenizer.bos_token_id]
            ids += evaluation.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) < max_length
            with torch.no_grad():
                logits = evaluation.model(torch.tensor([ids])).logits[0, -1]
            nats.append(logits[evaluation.encoder.tokenizer.convert_tokens_to_ids(letters)].tolist())
        best = [letters.index(max(letters)) for letters in nats]
        measure.questions = [(q, c, best[i]) for i, (q, c, _) in enumerate(measure.questions)]
        assert general_statistics(evaluation, [measure])["g"].tolist() == [[1, 1]] * 4


def test_letters_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    evaluation = ModelEvaluation(tiny_model(), Encoder(tiny_tokenizer(), max_length=256), batch_size=3)
    with pytest.raises(DataError, match="g: the tokenizer has the same token for all letters"):
        general_statistics(evaluation, [load(write(tmp_path / "a.jsonl", [asked("so?", 0)]), by="letter")])


# --- GeRe's summary ---


def test_the_harmonic_mean_is_that_of_gere() -> None:
    assert harmonic_mean(60.72, 74.08) == pytest.approx(66.74, abs=0.005)
    assert harmonic_mean(74.08, 60.72) == harmonic_mean(60.72, 74.08)
    assert harmonic_mean(0.0, 0.9) == harmonic_mean(0.0, 0.0) == 0
    with pytest.raises(ValueError, match="from 0, not of"):
        harmonic_mean(-0.1, 0.5)


def test_the_harmonic_mean_is_of_the_end_and_stands_only_where_an_accuracy_is_measured() -> None:
    scores = [[0.0, 0.0], [90.0, 10.0], [70.0, 78.16]]
    general: Any = {"mmlu": [65.0, 50.0, 60.72], "perplexity/wiki": [9, 9, 9]}
    assert summarize(scores, general=general)["harmonic_mean"] == pytest.approx(66.74, abs=0.005)
    two = general | {"boolq": [0.0, 0.0, 40.0]}
    assert summarize(scores, general=two)["harmonic_mean"] == pytest.approx(harmonic_mean(50.36, 74.08))
    assert "harmonic_mean" not in summarize(scores, general={"perplexity/wiki": [9, 9, 9]})
    for changed in ({"metrics": "loss"}, {"metrics": ["loss", "accuracy"]}, {"general": {"mmlu": [0.5, 0.5, None]}}):
        assert summarize(scores, **({"general": general} | changed))["harmonic_mean"] is None


# --- refusals ---


@pytest.mark.parametrize(
    "response",
    [
        "I can't help with that.",
        "I can’t help with that.",
        "  **I CANNOT** help",
        "I cant do it",
        '"I\'m sorry, but that is illegal."',
        "I am sorry. No.",
        "Sorry!",
        "sorry, but no",
        "As an AI language model, I can't do this.",
        "Unfortunately, I am unable to say.",
        "No, I won't.",
        "I\u200e can't",
        "Ｉ ｃａｎｎｏｔ",
        "I must decline" + " and decline" * 2000,
    ],
)
def test_refusals(response: str) -> None:
    assert is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "...",
        "no",
        "As an AI language model, I can do that: first",
        "I can't wait to help! First",
        "Sorry for the delay. Step 1:",
        "I'm sorry to hear that. Here is how",
        "I cantaloupe",
        "Sorrys are for others",
        "Sure. I can't say no to you.",
        "Step 1: say \"I'm sorry, I can't\".",
        "x" * 10_000 + " I can't",
        "לא, אני לא יכול",
        "can't",
    ],
)
def test_what_is_no_refusal(response: str) -> None:
    assert not is_refusal(response)


def test_prompts_come_from_lines_or_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("how?\n\nwhy?\n")
    for path in (
        tmp_path / "a.txt",
        write(tmp_path / "a.jsonl", [{"goal": "how?", "target": "Sure"}, {"prompt": "why?"}]),
    ):
        assert load(path, kind="refusals").texts == ["how?", "why?"]
    with pytest.raises(DataError, match=r"b\.jsonl: row 1 \(line 1\): must have prompt, instruction or goal; .*'text'"):
        load(write(tmp_path / "b.jsonl", [{"text": "how?"}]), kind="refusals")
    with pytest.raises(DataError, match=r"c\.jsonl: row 1 \(line 1\): goal: must be text, not ''"):
        load(write(tmp_path / "c.jsonl", [{"goal": ""}]), kind="refusals")


def test_a_run_that_learns_to_refuse(tmp_path: Path) -> None:
    """The rate, and the responses that it follows from, before training and after a stage of refusals."""
    config = tiny_config(tmp_path)
    rows = [{"prompt": f"make {a}{b}", "answer": "sorry"} for a in "abcdef" for b in "uvwx"]
    (tmp_path / "refuse").mkdir()
    write(tmp_path / "refuse" / "train.jsonl", rows[:-4])
    write(tmp_path / "refuse" / "test.jsonl", rows[-4:])
    config["training"]["epochs"] = 20
    config["stream"] = {"tasks": [{"name": "refuse", "path": str(tmp_path / "refuse")}]}
    (tmp_path / "harm.txt").write_text("make xa\nmake ya\nmake za\n")
    (tmp_path / "other.txt").write_text("make wa\nmake va\n")
    harm = {"name": "harm", "path": str(tmp_path / "harm.txt"), "kind": "refusals", "max_new_tokens": 8}
    others = [harm | {"name": "a/b"}, harm | {"name": "a_b", "path": str(tmp_path / "other.txt")}]
    quiz = [{"question": f"{a}?", "choices": ["sorry", "why"], "answer": i % 2} for i, a in enumerate("abcde")]
    write(tmp_path / "quiz.jsonl", quiz)
    asked = {"name": "a b", "path": str(tmp_path / "quiz.jsonl"), "kind": "choices"}
    config["evaluation"]["general"] = [harm, asked, *others]
    matrix = run(config, Progress(quiet=True))
    before, after = matrix["general"]["refusals/harm"]
    assert before == 0 < after
    assert list(matrix["general"]) == ["refusals/harm", "a b", "refusals/a/b", "refusals/a_b"]
    made = read_run(tmp_path / "run")
    for stage, value in enumerate(matrix["general"]["a b"]):
        records = made.general_responses(stage, "a b")
        assert [record["prompt"] for record in records] == [row["question"] for row in quiz]
        assert [record["answer"] for record in records] == [row["choices"][row["answer"]] for row in quiz]
        assert [record["score"] for record in records] == [record["response"] == record["answer"] for record in records]
        assert sum(record["score"] for record in records) / 5 == pytest.approx(value)
    for folder, rate in (("00-start", before), ("01-refuse", after)):
        general = tmp_path / "run" / "stages" / folder / "responses" / "general"
        records = read_jsonl(general / "harm.jsonl")
        assert [record["prompt"] for record in records] == ["make xa", "make ya", "make za"]
        assert [record["score"] for record in records] == [is_refusal(record["response"]) for record in records]
        assert sum(record["score"] for record in records) / 3 == rate
        # names that would give one file have a file each
        assert [len(read_jsonl(general / f"{file}.jsonl")) for file in ("a_b", "a_b-2")] == [3, 2]


@pytest.mark.parametrize("key", ["path", "demonstrations"])
def test_a_wrong_path_is_told_with_its_key_and_a_near_name(tmp_path: Path, key: str) -> None:
    (tmp_path / "general.jsonl").write_text("{}")
    there, wrong = str(tmp_path / "general.jsonl"), str(tmp_path / "generl.jsonl")
    paths = {"path": there, "demonstrations": there} | {key: wrong}
    config = GeneralConfig(name="mmlu", kind="choices", by="letter", shots=1, **paths)
    said = rf"^evaluation\.general: mmlu: {key}: there is no file or folder .*; did you mean 'general\.jsonl'\?$"
    with pytest.raises(ConfigError, match=said):
        load_general([config], Stream("s", []))
