"""Scores of responses, losses and general abilities, against plain loops over single sequences."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.api.task import Example, General, Task, Turn
from holdfast.config.model import ModelConfig
from holdfast.data.encode import Encoder
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import evaluate_general
from holdfast.evaluation.respond import evaluate_task, response_limit
from holdfast.models.likelihood import token_losses
from holdfast.models.pretrained import load_tokenizer
from holdfast.scoring.match import accuracy, normalize
from holdfast.scoring.overlap import rouge_l, super_ni_rouge_l
from holdfast.scoring.score import beside_score, task_score
from support.paths import GOLDEN, SHARED

torch.set_num_threads(1)  # models this small lose time to threads

STORIES = SHARED / "data" / "models" / "stories260K" / "hf"

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?!012345"
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
VOCAB = FIRST + len(LETTERS)
WINDOW = 24


class Letters:
    """An encoder whose tokens are letters; text is read in windows of ``WINDOW`` tokens."""

    tokenizer = SimpleNamespace(pad_token_id=PAD)
    max_length = 128

    def __init__(self):
        self.stop_ids = [EOS]

    def ids(self, text: str) -> list[int]:
        return [FIRST + LETTERS.index(letter) for letter in text]

    def prompt(self, example: Example, reserve: int) -> list[int]:
        return [BOS, *self.ids(example.question + " ")]

    def asked(self, prompt: list[int]) -> dict:
        return {"input_ids": prompt}

    def choice(self, example: Example, end: bool) -> dict:
        [row] = self.encode(example)
        return row if end else {key: row[key][:-1] for key in ("input_ids", "labels")}

    def encode(self, example: Example) -> list[dict]:
        if example.text is not None:
            ids = self.ids(example.text)
            windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
            return [{"input_ids": ids, "labels": ids, "row": example.row} for ids in windows]
        prompt, answer = self.prompt(example, 0), [*self.ids(example.answer), EOS]
        return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "row": example.row}]

    def answer_length(self, example: Example) -> int:
        return len(example.answer) + 1

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[token - FIRST] for token in ids if token >= FIRST)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        attention_dropout=0.5,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def words(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(LETTERS[1:27]) for _ in range(rng.randint(low, high)))


def question(row: int, ask: str, answer: str) -> Example:
    return Example(file="test.json", row=row, turns=(Turn("user", ask), Turn("assistant", answer)))


def questions_task(metric: str = "accuracy") -> Task:
    rng = random.Random(0)
    rows = [question(row, words(rng, 1, 30), words(rng, 1, 6)) for row in range(13)]
    return Task(name="letters", metric=metric, train=rows[:6], test=rows[6:])


def texts(n: int = 7) -> list[str]:
    rng = random.Random(1)
    return [words(rng, 2, 60) for _ in range(n)]


def text_task() -> Task:
    rows = [Example(file="test.txt", row=row, text=text) for row, text in enumerate(texts())]
    return Task(name="prose", metric="loss", train=rows, test=rows)


def plain_losses(model, row: dict) -> tuple[float, int]:
    """Nats and tokens of one sequence, in one forward pass of its own."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    terms = [-float(logs[k - 1, label]) for k, label in enumerate(row["labels"]) if k > 0 and label != -100]
    return sum(terms), len(terms)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Positive.", "positive"),
        ("  very\n negative ", "Very  Negative"),
        ("“World”", "World"),
        ('"World."', "world"),
        ("(a)", "A"),
        ("Straße", "STRASSE"),
        ("ＡＢＣ１２", "abc12"),
        ("«Paris»!", "paris"),
        ("¿Quién?", "quién"),
        ("cafe\u0301", "café"),
        ("「東京」。", "東京"),
        ("東京都！", "東京都"),
        ("हाँ।", "हाँ"),
        ("D.C.", "d.c"),
        ("?", "?"),
        ("", " \n"),
    ],
)
def test_accuracy_is_one(response: str, answer: str):
    assert accuracy(response, answer) == accuracy(answer, response) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("75", "7"),
        ("7", "75"),
        ("-5", "5"),
        (".5", "5"),
        ("5%", "5"),
        ("$5", "5"),
        ("C#", "C"),
        ("C++", "C"),
        ("not positive", "positive"),
        ("positive, because it is", "positive"),
        ("well-known", "well known"),
        ("1,000", "1000"),
        ("東京", "東京都"),
        ("", "positive"),
        (".", "?"),
        ("", "."),
    ],
)
def test_accuracy_is_zero(response: str, answer: str):
    assert accuracy(response, answer) == accuracy(answer, response) == 0.0


def test_normalize_changes_nothing_the_second_time():
    rng = random.Random(0)
    signs = " \t\n\"'`“”«»()[]{}.,;:!?。、¿¡-%#$aA1éßﬁ½東"
    for _ in range(3000):
        once = normalize("".join(rng.choice(signs) for _ in range(rng.randrange(8))))
        assert normalize(once) == once


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@pytest.mark.parametrize("metric", [rouge_l, super_ni_rouge_l])
def test_rouge_l_equals_its_definition(metric):
    rng = random.Random(0)
    for _ in range(100):
        a, b = (" ".join(rng.choices(["Red", "green", "12", "blue-ish"], k=rng.randrange(7))) for _ in "ab")
        words_a, words_b = (text.lower().replace("-", " ").split() for text in (a, b))
        common = longest_common(words_a, words_b)
        assert metric(a, b) == pytest.approx(2 * common / (len(words_a) + len(words_b)) if common else 0.0)


def test_rouge_l_equals_the_rouge_score_package():
    """Values of rouge-score 0.1.2 with its own words, without and with stemmer; without only on ASCII text."""
    rows = json.loads((GOLDEN / "rouge_l.json").read_text(encoding="utf-8"))
    assert len(rows) == 80
    for row in rows:
        pair = row["response"], row["answer"]
        assert super_ni_rouge_l(*pair) == row["super_ni_rouge_l"], pair
        if "rouge_l" in row:
            assert rouge_l(*pair) == row["rouge_l"], pair


def test_rouge_l_reads_every_script():
    assert rouge_l("我喜欢东京", "我喜欢京都") == pytest.approx(2 * 4 / 10)
    assert rouge_l("Привет, мир!", "привет мир") == 1.0
    assert rouge_l("das schöne Haus", "das schöne Boot") == pytest.approx(2 / 3)
    assert rouge_l("", "東京") == 0.0


def test_scoring_needs_no_heavy_import():
    code = "import sys, holdfast.scoring.score, holdfast.metrics.summary; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "nltk"} & set(loaded)


def test_records_hold_what_a_plain_loop_responds(model):
    encoder, task = Letters(), questions_task()
    records = evaluate_task(ModelEvaluation(model, encoder, 3), task)
    limit = max(len(example.answer) + 1 for example in task.train) + 8
    assert response_limit(encoder, task) == limit
    lengths = []
    for record, example in zip(records, task.test, strict=True):
        new: list[int] = []
        while len(new) < limit:
            with torch.no_grad():
                ids = torch.tensor([encoder.prompt(example, 0) + new])
                new.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
            if new[-1] == EOS:
                new.pop()
                break
        lengths.append(len(new))
        response = encoder.decode(new)
        assert record == {
            "row": example.row,
            "prompt": example.turns[0].content,
            "answer": example.answer,
            "response": response,
            "score": accuracy(response, example.answer),
        }
    assert max(lengths) == limit
    assert min(lengths) < limit
    short = evaluate_task(ModelEvaluation(model, encoder, 3), task, max_new_tokens=2)
    for brief, record in zip(short, records, strict=True):
        assert len(brief["response"]) <= 2
        assert record["response"].startswith(brief["response"])


def test_every_stop_token_of_the_encoder_ends_a_response(model):
    encoder, task = Letters(), questions_task()
    before = [record["response"] for record in evaluate_task(ModelEvaluation(model, encoder, 3), task)]
    turn_end = max(before, key=len)[1]
    encoder.stop_ids = [EOS, FIRST + LETTERS.index(turn_end)]
    after = [record["response"] for record in evaluate_task(ModelEvaluation(model, encoder, 3), task)]
    assert after == [response.partition(turn_end)[0] for response in before]


def test_right_and_wrong_responses_make_the_score(model):
    encoder, task = Letters(), questions_task()
    records = evaluate_task(ModelEvaluation(model, encoder, 4), task, max_new_tokens=5)
    told = [
        question(example.row, example.question, record["response"].upper() + "." if k < 2 else "no")
        for k, (example, record) in enumerate(zip(task.test, records, strict=True))
    ]
    known = Task(name="known", metric="accuracy", train=told, test=told)
    again = evaluate_task(ModelEvaluation(model, encoder, 4), known, max_new_tokens=5)
    assert [record["score"] for record in again] == [1.0] * 2 + [0.0] * 5
    assert task_score(again, "accuracy") == pytest.approx(2 / 7)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("task", [text_task(), questions_task("loss")], ids=["text", "questions"])
def test_losses_equal_a_plain_loop(model, task: Task, batch_size: int):
    encoder = Letters()
    records = evaluate_task(ModelEvaluation(model, encoder, batch_size), task)
    all_nats, all_tokens = 0.0, 0
    for record, example in zip(records, task.test, strict=True):
        parts = [plain_losses(model, row) for row in encoder.encode(example)]
        nats, tokens = (sum(part) for part in zip(*parts, strict=True))
        loss = pytest.approx(nats / tokens, rel=1e-5)
        assert record == {"row": example.row, "score": loss, "nats": pytest.approx(nats, rel=1e-5), "tokens": tokens}
        all_nats, all_tokens = all_nats + nats, all_tokens + tokens
    assert task_score(records, "loss") == pytest.approx(all_nats / all_tokens, rel=1e-5)
    assert task_score(records, "loss") != pytest.approx(np.mean([record["score"] for record in records]), rel=1e-3)


def test_token_losses_of_rows_without_supervision_are_zero(model):
    rows = [
        {"input_ids": [BOS, 5, 6, 7], "labels": [-100] * 4},
        {"input_ids": [BOS, 5], "labels": [BOS, 5]},
        {"input_ids": [BOS], "labels": [BOS]},
    ]
    losses, tokens = token_losses(model, rows, batch_size=2, pad_token_id=PAD)
    assert tokens.tolist() == [0, 1, 0]
    assert losses[[0, 2]].tolist() == [0, 0]
    assert losses[1] == pytest.approx(plain_losses(model, rows[1])[0], rel=1e-5)
    assert losses.dtype == np.float64


def test_sequences_that_differ_in_their_last_token_are_read_once(model):
    rng = random.Random(3)
    asked = [[BOS, *(rng.randrange(FIRST, VOCAB) for _ in range(length))] for length in (5, 9, 5)]
    rows = [{"input_ids": [*ids, k], "labels": [-100] * len(ids) + [k]} for k in range(5, 9) for ids in asked]
    rows.append({"input_ids": [*asked[0], 7], "labels": [BOS, *asked[0][1:], 7]})  # supervised elsewhere too
    rows.append({"input_ids": [*asked[1], 7, 8], "labels": [-100] * 11 + [8]})
    read: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    try:
        losses, tokens = token_losses(model, rows, batch_size=3, pad_token_id=PAD)
    finally:
        hook.remove()
    assert read == [3, 1]
    assert tokens.tolist() == [1] * 12 + [6, 1]
    assert losses == pytest.approx([plain_losses(model, row)[0] for row in rows], rel=1e-5)


def test_perplexity_and_choices_equal_plain_loops(model):
    encoder, rng = Letters(), random.Random(2)
    asked = [(words(rng, 3, 20), [words(rng, 1, 9) for _ in range(2 + k % 3)]) for k in range(8)]

    def likeliest(ask: str, choices: list[str]) -> int:
        return int(np.argmin([plain_losses(model, encoder.choice(question(0, ask, c), end=False))[0] for c in choices]))

    best = [likeliest(ask, choices) for ask, choices in asked]
    assert len(set(best)) > 1
    right = [(ask, choices, pick) for (ask, choices), pick in zip(asked, best, strict=True)]
    wrong = [(ask, choices, (pick + 1) % len(choices)) for ask, choices, pick in right]
    measures = [
        General("facts", "choices", questions=right[:3] + wrong[3:]),
        General("prose", "perplexity", texts=texts()),
        General("lies", "choices", questions=wrong),
        General("perplexity/other", "perplexity", texts=texts()[:2]),
        General("truths", "choices", questions=right),
    ]
    values = evaluate_general(ModelEvaluation(model, encoder, 5), measures)
    assert list(values) == ["facts", "perplexity/prose", "lies", "perplexity/other", "truths"]
    assert (values["facts"], values["lies"], values["truths"]) == (3 / 8, 0.0, 1.0)
    for name, chosen in (("perplexity/prose", texts()), ("perplexity/other", texts()[:2])):
        rows = [row for k, text in enumerate(chosen) for row in encoder.encode(Example("", k, text=text))]
        nats, tokens = (sum(part) for part in zip(*(plain_losses(model, row) for row in rows), strict=True))
        assert values[name] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert evaluate_general(ModelEvaluation(model, encoder, 5), []) == {}


def measurements():
    return {
        "responses": lambda model, **o: evaluate_task(ModelEvaluation(model, Letters(), 3), questions_task(), **o),
        "losses": lambda model, **o: evaluate_task(ModelEvaluation(model, Letters(), 3), text_task(), **o),
        "general": lambda model, **o: evaluate_general(
            ModelEvaluation(model, Letters(), 3), [General("prose", "perplexity", texts=texts())], **o
        ),
    }


@pytest.mark.parametrize("name", measurements())
def test_measuring_leaves_no_trace(name: str):
    """In training mode, with dropout, results are those of eval mode; modes and random states stay as they were."""
    measure = measurements()[name]
    model = tiny_llama()
    expected = measure(model)
    model.train()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert measure(model) == expected
    assert all(module.training for module in model.modules())
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", measurements())
def test_on_batch_counts_up_and_may_stop(name: str):
    measure = measurements()[name]
    model = tiny_llama().train()
    counts: list[int] = []
    measure(model, on_batch=lambda done, total: counts.append(done))
    assert counts[0] == 3
    assert counts == sorted(set(counts))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, on_batch=stop)
    assert all(module.training for module in model.modules())
    assert not torch.is_inference_mode_enabled()


def test_a_pretrained_model_with_its_own_tokenizer():
    """Perplexity is that of transformers' own loss; a fluent story and sensible choices win; batches do not matter."""
    if not STORIES.exists():
        pytest.skip("the pretrained model is not here")
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(ModelConfig(name=str(STORIES)))
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    encoder = Encoder(tokenizer, max_length=64)
    stories = ["One day, a boy named Tim went to the park with his mom.", "Once upon a time, there was a little girl."]
    jumble = ["park the in boy day his named mom One with Tim went."]
    asked = [("One day, a little girl named", ["Lily", "table"], 0), ("The dog was very", ["table", "happy"], 1)]
    measures = [
        General("stories", "perplexity", texts=stories),
        General("jumble", "perplexity", texts=jumble),
        General("choices", "choices", questions=asked),
    ]
    values = evaluate_general(ModelEvaluation(model, encoder, 2), measures)
    nats = tokens = 0
    for text in stories:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert values["perplexity/stories"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert values["perplexity/stories"] < 5 < values["perplexity/jumble"]
    assert values["choices"] == 1.0

    rows = [question(k, text[: 9 + 5 * k], "and they were happy") for k, text in enumerate(stories * 3)]
    task = Task("stories", "rouge_l", train=rows, test=rows)
    one_by_one, together = (evaluate_task(ModelEvaluation(model, encoder, size), task) for size in (1, 6))
    assert one_by_one == together
    assert len({record["response"] for record in together}) > 1
    assert 0 < task_score(together, "rouge_l") < 1


@pytest.mark.parametrize("first", ["loss", "rouge_l", "choice_acc"])
def test_metrics_that_read_different_things_are_measured_together(model, first):
    """Each has the values that it has alone, and the progress runs from nothing to all of it once."""
    metrics = ["loss", "rouge_l", "choice_acc", "choice_likelihood"]
    labels = sorted(example.answer for example in questions_task().test)

    def measured(metric: str, beside: list[str]) -> tuple[Task, list[dict]]:
        task = questions_task(metric)
        task.labels, task.beside = labels, beside
        evaluation = ModelEvaluation(model, Letters(), batch_size=4)
        records = evaluate_task(evaluation, task, on_batch=lambda done, total: shares.append(done / total))
        return task, records

    shares: list[float] = []
    others = [name for name in metrics if name != first]
    _task, together = measured(first, others)
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
    for name in metrics:
        _, alone = measured(name, [])
        score = task_score(together, name) if name == first else beside_score(together, name)
        assert score == pytest.approx(task_score(alone, name))
        if name == "rouge_l":
            assert [record["response"] for record in together] == [record["response"] for record in alone]
