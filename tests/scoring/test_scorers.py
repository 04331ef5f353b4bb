"""Each metric: what it accepts, against values of the libraries, of published code, or by hand."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.api.task import Example, Task, Turn
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.stream import TaskOptions
from holdfast.data.source import scored as scored_task
from holdfast.errors import ConfigError
from holdfast.metrics.intervals import intervals
from holdfast.metrics.matrix import LOWER_IS_BETTER
from holdfast.metrics.summary import by_task, summarize
from holdfast.models.endpoint import Endpoint
from holdfast.scoring import SCORERS, Scorer, build, find
from holdfast.scoring.choice import choice_letter, letter
from holdfast.scoring.match import o_lora_exact_match, trace_prefix_match
from holdfast.scoring.overlap import edit_similarity, super_ni_rouge_l, trace_rouge_l
from holdfast.scoring.sari import sari
from holdfast.scoring.score import beside_score, response_records, score_records, task_score
from holdfast.system.files import read_json
from support.doubles import ChatServer, write_sentence_model
from support.installed import install
from support.paths import GOLDEN

OF_RESPONSES = [scorer for scorer in SCORERS.values() if scorer.reads == "response" and not scorer.needs]
LONG = "the answer is not known " * 420  # more than 10,000 characters
ARABIC, HEBREW = "القاهرة", "תל אביב"


def record(response: str, answer: str = "7", prompt: str = "What is 3 + 4?") -> dict[str, Any]:
    return {"row": 0, "prompt": prompt, "answer": answer, "response": response}


def score(metric: str, response: str, answer: str) -> float:
    return SCORERS[metric].row(record(response, answer))


def scored(metric: str, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Records of (response, answer) with their scores."""
    records = [record(response, answer) for response, answer in pairs]
    for entry, value in zip(records, SCORERS[metric].rows(records), strict=True):
        entry["score"] = value
    return records


# --- exact match ---


@pytest.mark.parametrize(
    ("response", "answer", "strict", "prefix", "bare"),
    [
        ("7", "7", 1, 1, 1),
        ("75", "7", 0, 1, 0),
        (" 7. ", "7", 1, 0, 1),
        ("-7", "7", 0, 0, 1),
        ("", "7", 0, 0, 0),
        ("Sports", "sports", 1, 0, 1),
        ("sports and more", "sports", 0, 1, 0),
        ("it is sports", "sports", 0, 0, 0),
        ("sci/tech", "scitech", 0, 0, 1),
        ("very  negative\n", "very negative", 1, 0, 1),
        (ARABIC + "؟", ARABIC, 1, 1, 0),
        ("\u202b" + HEBREW + "\u202c", HEBREW, 1, 0, 0),  # marks of writing direction
        (LONG + "7", "7", 0, 0, 0),
        ("7" + LONG, "7", 0, 1, 0),
    ],
)
def test_whole_answers_and_the_variants_of_sources(response: str, answer: str, strict: int, prefix: int, bare: int):
    assert score("accuracy", response, answer) == strict
    assert trace_prefix_match(response, answer) == prefix
    assert o_lora_exact_match(response, answer) == bare


@pytest.mark.parametrize(
    ("source", "theirs", "metric"),
    [
        ("TRACE", "accuracy", "trace_exact_match"),
        ("TRACE", "first", "trace_first_character"),
        ("TRACE", "rouge", "trace_rouge_l"),
        ("TreeLoRA", "accuracy", "tree_lora_prefix_match"),
        ("TreeLoRA", "first", "tree_lora_first_character"),
        ("TreeLoRA", "rouge", "tree_lora_rouge_l"),
    ],
)
def test_the_sources_own_code_gives_the_same_scores(source: str, theirs: str, metric: str):
    rows = read_json(GOLDEN / "trace_scores.json")["rows"]
    expected = [row[source][theirs] or 0.0 for row in rows]  # where their code fails, ours scores 0
    assert [SCORERS[metric].row(record(row["response"], row["answer"])) for row in rows] == pytest.approx(expected)
    other = "TreeLoRA" if source == "TRACE" else "TRACE"
    assert expected != [row[other][theirs] for row in rows]


def test_records_without_a_metric_beside_are_scored_from_their_responses():
    """So runs of 0.1.0 go on, whose streams had trace_prefix_match in the place of TRACE's own rule."""
    old = [record("75") | {"score": 0.0, "beside": {"trace_prefix_match": 1.0}}, record("7") | {"score": 1.0}]
    assert beside_score(old, "trace_exact_match") == 0.5
    assert beside_score(old, "trace_prefix_match") == 1.0


def test_the_best_of_several_right_answers_counts():
    several = record("Mumbai", "Bombay") | {"answers": ["Bombay", "mumbai"]}
    assert SCORERS["accuracy"].row(several) == 1
    assert SCORERS["rouge_l"].row(several) == 1
    assert SCORERS["sari"].row(several | {"input": "Mumbai"}) == sari("Mumbai", "Mumbai", ["Bombay", "mumbai"])


# --- multiple choice ---


@pytest.mark.parametrize(
    "response",
    ["B", "b", " B. ", "(B)", "[B]", '"B"', "**B**", "B.", "B: since", "B) a poem", "B. hawkish", "(b) a poem",
     "B - a poem", "B\nA clause is a group of words.", "Ｂ", "B。", "The answer is B.", "The answer is (B), not A.",
     "Answer: B", "答案是B", "答案：B。", "I think so.\nAnswer: B"],
)  # fmt: skip
def test_these_choose_b(response: str):
    assert letter(response) == "B"
    assert choice_letter(response, "B") == choice_letter(response, "B\nbecause") == 1
    assert choice_letter(response, "A") == 0


@pytest.mark.parametrize(
    "response",
    ["", " ", "Because", "A dog barks", "B or C", "A, B", "I would pick B here", "a b c", "e.g. this", "Banana", "B2",
     "7", "the answer is bad", "The answer is Because", "12. B", HEBREW, ARABIC, LONG, "!!!"],
)  # fmt: skip
def test_these_choose_nothing(response: str):
    assert letter(response) is None
    assert choice_letter(response, "B") == 0


def choice(right: str, nats: list[float], tokens: list[int]) -> dict[str, Any]:
    choices = ["short", "a longer one", "another"]
    return record("", right) | {"choices": choices, "choice_nats": nats, "choice_tokens": tokens}


def test_the_likeliest_choice_by_sum_and_by_mean():
    offered = choice("a longer one", [2.0, 4.0, 6.0], [1, 4, 2])  # means 2, 1 and 3
    assert SCORERS["choice_likelihood"].row(offered) == 0
    assert SCORERS["choice_likelihood_mean"].row(offered) == 1
    assert SCORERS["choice_likelihood"].row(choice("short", [2.0, 2.0, 3.0], [1, 1, 1])) == 1  # the first of equals


# --- overlap ---


def test_rouge_l_of_trace_equals_its_package():
    """Values of the rouge package 1.0.1 on (answer, response), the way round in which TRACE calls it."""
    assert trace_rouge_l("The bill passed. It was late.", "The bill was passed.") == pytest.approx(0.7999999952)
    assert trace_rouge_l("A. B. C", "C. B") == pytest.approx(0.7999999952)
    assert trace_rouge_l("a b c", "c b a") == pytest.approx(1 / 3, abs=1e-8)
    assert trace_rouge_l(". .", "a") == trace_rouge_l("", "a") == trace_rouge_l("...", "a") == 0


def test_rouge_l_of_super_ni_stems_and_reads_only_latin_letters():
    assert super_ni_rouge_l("He runs", "he running") == 1
    assert super_ni_rouge_l("東京", "東京") == 0
    assert score("rouge_l", "東京", "東京") == 1
    assert score("rouge_l", "He runs", "he running") == 0.5


def test_bleu_is_that_of_sacrebleu():
    """The example of sacrebleu's documentation, with one reference of each row and with both."""
    hypotheses = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    first = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    second = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    records = scored("bleu", list(zip(hypotheses, first, strict=True)))
    for entry, other in zip(records, second, strict=True):
        entry["answers"] = [entry["answer"], other]
    assert task_score(records, "bleu") == pytest.approx(0.48530827009, rel=1e-9)  # documented as 48.530827009929865
    assert records[0]["score"] == pytest.approx(1)
    assert task_score(scored("bleu", [("", "a b"), ("", "c")]), "bleu") == 0


def test_edit_similarity_is_that_of_rapidfuzz_after_literals():
    assert edit_similarity("this is a test", "this is a test!") == pytest.approx(0.9655172413793103)
    assert edit_similarity("print ( 0 )", "print ( <NUM_LIT> )") == 1
    assert edit_similarity("open ( '' )", "open ( '<STR_LIT>' )") == 1
    assert edit_similarity("f ( 'a>b' , 200 )", "f ( '<STR_LIT:a>b>' , <NUM_LIT:200> )") < 1
    assert edit_similarity("f ( 200 )", "f ( <NUM_LIT:200> )") == 1
    assert edit_similarity("", "") == 0


# --- SARI ---

SOURCE = "About 95 species are currently accepted."
REFERENCES = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("About 95 you now get in.", 0.26953601953601954),  # documented with Hugging Face's sari
        ("About 95 species are now agreed.", 0.6170965608465608),  # and these are values of its code
        ("About 95 species are currently agreed.", 0.5088681849551414),
        (SOURCE, 0.5520655085990839),
        ("", 0.16078042328042327),
    ],
)
def test_sari_is_that_of_hugging_face(response: str, value: float):
    assert sari(SOURCE, response, REFERENCES) == pytest.approx(value, rel=1e-12)


def test_sari_by_hand():
    """One word each way: "a" is kept, "b" deleted, "c" added, all as the reference has it; no n-gram but one word."""
    assert sari("a b", "a c", ["a c"]) == 1
    # Unigrams: keep 2pr/(p+r) with p = 1, r = 1; delete: of b nothing is deleted, so 1; add: p = 1 of nothing, r = 0.
    # Bigrams: "a b" is kept wrongly: keep p = 0, r = 1 of nothing, so 0; delete 1; add p = 1, r = 0. Longer: all 1.
    assert sari("a b", "a b", ["a c"]) == pytest.approx(((2 * 0.5 / 1.5 + 1 + 0) + (0 + 1 + 0) + 3 + 3) / 12)


def test_the_source_of_sari_is_the_text_alone_and_of_trace_the_whole_prompt():
    prompt = f"Simplify.\n\nParagraph:\n{SOURCE}\n\nSimplification:"
    start = prompt.index(SOURCE)
    turns = (Turn("user", prompt, (start, start + len(SOURCE))), Turn("assistant", REFERENCES[0]))
    task = Task("t", "sari", [], [Example("f", 0, turns)], beside=["trace_sari"])
    [entry] = score_records(task, response_records(task, ["About 95 species."]))
    assert entry["input"] == SOURCE
    assert entry["score"] == sari(SOURCE, "About 95 species.", REFERENCES[:1])
    assert entry["beside"] == {"trace_sari": sari(prompt, "About 95 species.", REFERENCES[:1])}
    assert beside_score([entry], "trace_sari") == entry["beside"]["trace_sari"] != entry["score"]


# --- scores that are no means ---


def test_macro_f1_by_hand_and_of_scikit_learn():
    pairs = [("a", "a"), ("B.", "a"), ("b", "b"), ("zzz", "b"), ("a", "c")]
    # a: 1 of 2 predicted and 1 of 2 true, F1 1/2; b: the same; c: never predicted, 0.
    assert task_score(scored("macro_f1", pairs), "macro_f1") == pytest.approx(1 / 3)
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = random.Random(3)
    pairs = [(rng.choice("abcx"), rng.choice("abc")) for _ in range(80)]
    expected = metrics.f1_score(
        [answer for _, answer in pairs], [response for response, _ in pairs], labels=list("abc"), average="macro"
    )
    assert task_score(scored("macro_f1", pairs), "macro_f1") == pytest.approx(expected)


def test_macro_f1_is_no_mean_of_rows():
    records = scored("macro_f1", [("a", "a")] * 9 + [("a", "b")])
    assert np.mean([entry["score"] for entry in records]) == 0.9
    assert task_score(records, "macro_f1") == pytest.approx((18 / 19 + 0) / 2)


@pytest.mark.parametrize("metric", ["macro_f1", "bleu", "rouge_l"])
def test_intervals_draw_rows_and_compute_the_score_again(metric: str):
    rng = random.Random(1)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    answers = [" ".join(rng.sample(words, 5 if metric == "bleu" else 1)) for _ in range(12)]
    stages = []
    for _ in range(2):
        responses = [answer if rng.random() < 0.6 else rng.choice(answers) for answer in answers]
        stages.append(scored(metric, list(zip(responses, answers, strict=True))))
    resamples, draws = 40, np.random.default_rng([0, 0])
    values = []
    for _ in range(resamples):
        drawn = draws.integers(12, size=12)
        values.append(task_score([stages[1][i] for i in drawn], metric))
    scorer = SCORERS[metric]
    statistics = [[scorer.statistics(records)] for records in stages]
    found = intervals(statistics, totals=[scorer.total], resamples=resamples)["average"]
    assert found == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)


def test_loss_and_perplexity_weigh_tokens_alike():
    records = [{"nats": 4.0, "tokens": 2}, {"nats": 3.0, "tokens": 8}]
    assert SCORERS["loss"].rows(records) == [2.0, 0.375]
    assert task_score(records, "loss") == 0.7
    assert SCORERS["perplexity"].rows(records) == pytest.approx([math.exp(2), math.exp(0.375)])
    assert task_score(records, "perplexity") == pytest.approx(math.exp(0.7))


# --- all of them ---


@pytest.mark.parametrize("scorer", OF_RESPONSES, ids=lambda scorer: scorer.name)
@pytest.mark.parametrize("response", ["", " \n", LONG, ARABIC, HEBREW + " 7", "7" * 10_000, "." * 50, "\u0000", "🙂"])
def test_any_text_has_a_score_between_0_and_1(scorer: Scorer, response: str):
    answer = "B" if scorer.name.startswith("choice") else ARABIC
    value = scorer.row(record(response, answer))
    assert 0 <= value <= 1
    entry = record(response, answer) | {"score": value}
    assert 0 <= task_score([entry], scorer.name) <= 1


@pytest.mark.parametrize("metric", [scorer.name for scorer in OF_RESPONSES])
def test_the_right_answer_scores_1_and_nothing_less_than_it(metric: str):
    letters = ("choice_letter", "trace_first_character", "coin_choice_letter", "mllm_cl_choice")
    answer = "B" if metric in letters else "two pounds of the flour"
    answer = "[0.2, 0.3, 0.9, 0.78]" if "iou" in metric else answer
    assert score(metric, answer, answer) == pytest.approx(1, abs=1e-7) or metric.endswith("sari")
    assert score(metric, "", answer) < score(metric, answer, answer)


def test_an_unknown_metric_is_refused_with_the_near_name():
    with pytest.raises(ConfigError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        build("acuracy", EvaluationConfig())
    with pytest.raises(ConfigError, match=r"metric judge: needs evaluation\.judge"):
        build("judge", EvaluationConfig())


# --- of installed packages ---

WORD_ERRORS = """
from holdfast.api.scorer import Scorer


class WordErrors(Scorer):
    lower_is_better = needs_input = True

    def row(self, record):
        return float(record["response"] not in (record["answer"], record["input"]))


scorer = WordErrors("word_errors", about="words that are wrong; lower is better")
other = Scorer("another", lambda response, answer: 0.0)
"""


@pytest.fixture
def word_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"word_errors": "word_errors_package:scorer", "misnamed": "word_errors_package:other"}
    monkeypatch.delitem(sys.modules, "word_errors_package", raising=False)
    monkeypatch.syspath_prepend(install(tmp_path, "word_errors_package", WORD_ERRORS, {"holdfast.scorers": names}))


@pytest.mark.usefixtures("word_errors")
def test_a_scorer_of_an_installed_package_says_what_it_needs_and_which_direction_is_better():
    assert find("accuracy") is SCORERS["accuracy"] and "word_errors_package" not in sys.modules
    with pytest.raises(ConfigError, match="unknown metric 'word_error'; did you mean 'word_errors'"):
        find("word_error")
    assert "word_errors_package" not in sys.modules
    turns = (Turn("user", "Copy: a", (6, 7)), Turn("assistant", "b"))
    task = Task("t", "accuracy", [], [Example("f", 0, turns)])
    scored_task(task, TaskOptions(metric="word_errors"))
    [entry] = score_records(task, response_records(task, ["a"]))
    assert entry["input"] == "a" and entry["score"] == 0.0
    scores = [[0.9, 0.9], [0.2, 0.9], [0.5, 0.1]]
    assert summarize(scores, metrics=build("word_errors", EvaluationConfig()))["forgetting"] == pytest.approx(0.3)
    assert summarize(scores, metrics="word_errors")["forgetting"] == pytest.approx(-0.3)  # a bare name says nothing
    mixed = [find("word_errors"), find("accuracy")]
    assert summarize(scores, metrics=mixed)["average"] is None  # no common scale
    assert by_task(scores, metrics=mixed)["forgetting"][0] == pytest.approx(0.3)


@pytest.mark.usefixtures("word_errors")
def test_what_is_registered_must_be_a_scorer_of_that_name():
    with pytest.raises(ConfigError, match=r"holdfast\.scorers: word_errors_package:other must be .* name 'misnamed'"):
        find("misnamed")


def test_of_a_metric_that_is_not_installed_the_scores_of_a_run_are_a_mean():
    assert task_score([{"score": 0.25}, {"score": 0.75}], "of_long_ago") == 0.5


def test_holdfasts_own_metrics_say_which_direction_is_better():
    assert {name for name, scorer in SCORERS.items() if scorer.lower_is_better} == set(LOWER_IS_BETTER)


# --- semantic similarity ---


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return write_sentence_model(tmp_path_factory.mktemp("sentences"))


def test_similarity_is_the_cosine_of_embeddings(sentence_model: Path):
    scorer = build("semantic_similarity", EvaluationConfig(similarity_model=str(sentence_model)))
    pairs = [("good", "good"), ("great", "good"), ("bad", "good"), ("bed", "good"), ("", "good"), ("good bad", "bad")]
    records = [record(response, answer) for response, answer in pairs]
    assert scorer.rows(records) == pytest.approx([1, 0.8, 0, -1, 0, math.sqrt(0.5)], abs=1e-6)
    assert scorer.floor
    assert scorer.identity.endswith(str(sentence_model))
    assert scorer.rows([record("", "good")]) == [0]
    assert scorer.rows([record("great", "bad") | {"answers": ["bad", "good"]}]) == pytest.approx([0.8])


def test_a_model_that_is_none_is_named(tmp_path: Path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    scorer = build("semantic_similarity", EvaluationConfig(similarity_model=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"evaluation\.similarity_model: .*gone' cannot be loaded"):
        scorer.rows([record("a", "b")])


# --- a judge behind an endpoint ---


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("holdfast.models.endpoint.PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers: list[ChatServer] = []

    def start(replies: Any) -> ChatServer:
        servers.append(ChatServer(replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server: ChatServer, **options: Any) -> Scorer:
    return build("judge", EvaluationConfig.model_validate({"judge": {"url": server.url, "model": "judge-1"} | options}))


def test_a_judge_says_what_is_right(serve: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def replies(body: dict[str, Any], _: int) -> str:
        asked = body["messages"][0]["content"]
        return "Correct." if "Response:\nseven" in asked else "It is not, so: INCORRECT"

    server = serve(replies)
    records = [record("seven"), record("eight"), record(""), record("{question} and {answer}")]
    scorer = judge(server, key_variable="JUDGE_KEY")
    assert scorer.rows(records) == [1, 0, 0, 0]
    assert len(server.requests) == 3  # an empty response is wrong without asking
    assert {body["model"] for body in server.requests} == {"judge-1"}
    assert {body["temperature"] for body in server.requests} == {0}
    assert set(server.keys) == {"Bearer secret"}
    asked = {body["messages"][0]["content"] for body in server.requests}
    assert any(
        "Question:\nWhat is 3 + 4?\n\nRight answer:\n7\n\nResponse:\n{question} and {answer}" in q for q in asked
    )


def test_a_judge_without_a_verdict_is_asked_again_and_then_named(serve: Any):
    server = serve(lambda body, n: "Hm." if body["temperature"] == 0 else "correct")
    assert judge(server).rows([record("seven")]) == [1]
    assert [body["temperature"] for body in server.requests] == [0, 1]
    with pytest.raises(ConfigError, match=r"evaluation\.judge: 'judge-1' gave no verdict on 1 of 1 .* said 'Hm\.'"):
        judge(serve(lambda *_: "Hm.")).rows([record("seven")])


def test_an_endpoint_is_asked_again_after_statuses_that_pass(serve: Any):
    server = serve(lambda body, n: (503, "starting") if n <= 2 else body["messages"][0]["content"].upper())
    answers: dict[int, str] = {}
    endpoint = Endpoint(server.url + "/", "m", concurrency=4)
    conversations = [[{"role": "user", "content": f"question {n}"}] for n in range(20)]
    texts = endpoint.chat(conversations, on_answer=answers.__setitem__, max_tokens=5)
    assert texts == [f"QUESTION {n}" for n in range(20)] == [answers[n] for n in range(20)]
    assert len(server.requests) == 22
    assert server.requests[0]["max_tokens"] == 5
    assert set(server.keys) == {None}


def test_an_endpoint_that_refuses_or_is_not_there_is_named(serve: Any):
    server = serve(lambda *_: (401, "no such key"))
    with pytest.raises(ConfigError, match=r"endpoint '.*/v1', model 'm': status 401: .*no such key"):
        Endpoint(server.url, "m").chat([[{"role": "user", "content": "a"}]])
    assert len(server.requests) == 1
    server.close()
    with pytest.raises(ConfigError, match=r"no answer: .*; 3 attempts were made"):
        Endpoint(server.url, "m", retries=2).chat([[{"role": "user", "content": "a"}]])
    with pytest.raises(ConfigError, match="is no URL that can be asked"):
        Endpoint("localhost", "m").chat([[{"role": "user", "content": "a"}]])
