"""Tasks of lm-evaluation-harness as general abilities, from local files, without a network."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pytest
import torch

from holdfast.api.task import General, Stream
from holdfast.config.evaluation import EvaluationConfig, GeneralConfig
from holdfast.config.run import load_config
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.abilities import load_general
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import evaluate_general, general_statistics
from holdfast.evaluation.harness import _definitions, _results
from holdfast.models.answers import AnswerCache
from holdfast.runner.run import run
from support.tiny import tiny_config, tiny_model, tiny_tokenizer

TaskManager = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed").TaskManager

WORDS = ["red sea", "a tide comes", "green weed", "blue", "rock and sand", "it holds"]
SHARED = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test", "doc_to_text": "{{question}}"}
TASKS: dict[str, dict[str, Any]] = {
    "colour": {"output_type": "multiple_choice", "doc_to_choice": ["r", "green"], "doc_to_target": "{{label}}"},
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of task definitions: three tasks and a group of two of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": words, "label": i % 2, "answer": words[0]} for i, words in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "definitions"
    folder.mkdir()
    for name, task in TASKS.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | SHARED | files | task))  # JSON is YAML
    group = {"group": "mixed", "task": ["colour", "answer"]}
    (folder / "mixed.yaml").write_text(json.dumps(group))
    return str(folder)


def evaluation(template: str = "") -> ModelEvaluation:
    model, tokenizer = tiny_model(initializer_range=0.5), tiny_tokenizer()
    tokenizer.chat_template = template or None
    return ModelEvaluation(model.train(), Encoder(tokenizer, max_length=64), 4)


def measures(include: str, *tasks: str, **options: Any) -> list[Any]:
    config = GeneralConfig(kind="lm_eval", tasks=list(tasks), include_path=include, **options)
    return load_general([config], Stream("none", []))


def log_likelihood(model: Any, before: str, text: str) -> float:
    """By hand: of the text's tokens after what stands before it, or after the begin token."""
    tokenizer = tiny_tokenizer()
    first = tokenizer(before)["input_ids"] or [tokenizer.bos_token_id]
    ids = first + tokenizer(text)["input_ids"]
    with torch.no_grad():
        logs = model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[k - 1, ids[k]]) for k in range(len(first), len(ids)))


def test_values_are_those_of_a_plain_loop(include: str):
    own = evaluation()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = evaluate_general(own, [*measures(include, "colour"), *measures(include, "prose", metric="word_perplexity")])
    assert own.model.training
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    right = [log_likelihood(own.model, words, " r") > log_likelihood(own.model, words, " green") for words in WORDS]
    assert found["colour"] == np.mean([chosen == (i % 2 == 0) for i, chosen in enumerate(right)])
    nats = -sum(log_likelihood(own.model, "", words) for words in WORDS)
    words = sum(len(text.split()) for text in WORDS)
    assert found["perplexity/prose"] == pytest.approx(math.exp(nats / words), rel=1e-4)


CHAT = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}a: {% endif %}"


@pytest.mark.parametrize(
    ("trailing", "template"), [("", ""), (" ", ""), pytest.param("\n", "", marks=pytest.mark.slow), ("", CHAT)]
)
def test_choices_by_acc_are_those_of_the_library(include: str, tmp_path: Path, trailing: str, template: str):
    """Every pick is the library's own on the same questions; with the end of the answer, some are others."""
    chance = random.Random(0)

    def text(count: int) -> str:
        return "".join(chance.choices("abcdefgh", k=count))

    rows = [{"question": text(9) + trailing, "choices": [text(3) for _ in range(4)], "answer": 0} for _ in range(24)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.jsonl")}}, "doc_to_text": "question"}
    Path(include, "pick.yaml").write_text(json.dumps({"task": "pick"} | SHARED | files | task))
    own, [measure] = evaluation(template), measures(include, "pick", apply_chat_template=bool(template))
    results = _results(own, measure.harness)
    assert results is not None
    theirs = [np.argmax([nats for nats, _ in sample["filtered_resps"]]) for sample in results["samples"]["pick"]]

    def picks(by: Literal["acc", "acc_with_end"]) -> list[int]:
        right = []
        for k in range(4):
            questions = [(row["question"], row["choices"], k) for row in rows]
            right.append(general_statistics(own, [General("g", "choices", questions=questions, by=by)])["g"][:, 0])
        return np.argmax(right, axis=0).tolist()

    assert picks("acc") == theirs
    assert picks("acc_with_end") != theirs


@pytest.mark.parametrize("template", ["", CHAT.replace(": ", ":")])
def test_choices_by_length_are_those_of_the_library(include: str, tmp_path: Path, template: str):
    """acc, acc_norm and acc_bytes find right what the library's metrics of these names do, and differ. The template's
    prompt does not end in white space, whose likelihood the library would count."""
    chance = random.Random(0)
    rows = [
        {
            "question": "".join(chance.choices("abcdefgh", k=9)),
            "choices": [first + "".join(chance.choices("abcdé", k=chance.randint(1, 5))) for first in "efgh"],
            "answer": row % 4,
        }
        for row in range(48)
    ]
    (tmp_path / "lengths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: list[Any] = ["acc", "acc_norm", "acc_bytes"]
    task = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    task["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "lengths.jsonl")}}, "doc_to_text": "question"}
    Path(include, "lengths.yaml").write_text(json.dumps({"task": "lengths"} | SHARED | files | task))
    own, [measure] = evaluation(template), measures(include, "lengths", apply_chat_template=bool(template))
    results = _results(own, measure.harness)
    assert results is not None
    questions = [(row["question"], row["choices"], row["answer"]) for row in rows]
    found = []
    for name in names:
        right = general_statistics(own, [General("g", "choices", questions=questions, by=name)])["g"][:, 0].tolist()
        assert right == [sample[name] for sample in results["samples"]["lengths"]]
        found.append(tuple(right))
    assert len(set(found)) == 3


def test_a_split_that_the_data_lack_is_named(include: str):
    path = Path(include, "colour.yaml")
    path.write_text(path.read_text().replace('"test_split": "test"', '"test_split": "tset"'))
    with pytest.raises(DataError, match=r"'colour' cannot be measured: .*'tset'.*look at test_split"):
        general_statistics(evaluation(), measures(include, "colour"))


def test_options_of_the_library(include: str):
    own = evaluation()
    [few] = measures(include, "colour", limit=4, num_fewshot=2, metric="acc_norm", name="sea")
    assert few.name == "sea/colour"
    statistics = general_statistics(own, [few])["sea/colour"]
    assert statistics.shape == (4, 2) and set(statistics[:, 0]) <= {0.0, 1.0}
    assert general_statistics(own, measures(include, "colour", limit=0.5))["colour"].shape == (3, 2)
    pooled = general_statistics(own, measures(include, "mixed", limit=5))["mixed"]
    assert pooled.shape == (10, 2)


def test_a_measured_task_is_not_measured_again(include: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = evaluation()
    own.answers = AnswerCache(tmp_path / "answers.jsonl")
    first = evaluate_general(own, measures(include, "colour"))
    own.answers = AnswerCache(tmp_path / "answers.jsonl")
    monkeypatch.setattr("lm_eval.simple_evaluate", None)
    assert evaluate_general(own, measures(include, "colour")) == first


def test_a_saved_value_is_not_that_of_a_changed_definition(include: str, tmp_path: Path):
    own = evaluation()
    own.answers = AnswerCache(tmp_path / "answers.jsonl")
    first = evaluate_general(own, measures(include, "colour"))
    task = asdict(measures(include, "colour")[0].harness)
    own.answers.add(["lm_eval", task, _definitions(include)], [[0.25, 1.0]])
    assert evaluate_general(own, measures(include, "colour")) == {"colour": 0.25}  # it is that of the saved one
    Path(include, "colour.yaml").write_text(Path(include, "colour.yaml").read_text() + " ")
    assert evaluate_general(own, measures(include, "colour")) == first


def test_what_cannot_be_measured_says_why(include: str, tmp_path: Path):
    def value(*tasks: str, **options: Any) -> Any:
        return evaluate_general(evaluation(), measures(include, *tasks, **options))

    with pytest.raises(ConfigError, match=r"lm_eval task 'prose': is measured by a perplexity; .* word_perplexity"):
        value("prose")
    with pytest.raises(ConfigError, match=r"metric: of bits_per_byte lower is better; choose another: word_perp"):
        value("prose", metric="bits_per_byte")
    with pytest.raises(ConfigError, match=r"metric: has none called 'acc_nrm'; did you mean 'acc_norm,none'"):
        value("colour", metric="acc_nrm")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm_eval task 'answer' cannot be measured: .*rows\.jsonl"):
        value("answer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lm_eval"}, r"tasks: kind lm_eval needs them"),
        ({"kind": "lm_eval", "tasks": ["a"], "rows": 3}, r"rows: is not for kind lm_eval, which has tasks, include_p"),
        ({"name": "a", "path": "a.txt", "limit": 3}, r"limit: is for kind lm_eval, not perplexity"),
        ({"path": "a.txt"}, r"name: is required but absent"),
    ],
)
def test_keys_of_other_kinds_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig.model_validate({"general": [changes]})
    whole = GeneralConfig(name="a", path="a.txt", kind="choices").model_dump()
    assert GeneralConfig.model_validate(whole).model_dump() == whole  # as run.json holds it


def test_a_run_measures_them_after_every_stage(include: str, tmp_path: Path):
    config = tiny_config(tmp_path, tuner={"name": "lora", "r": 2})
    config["stream"] |= {"order": ["red"]}
    config["training"] |= {"epochs": 1}
    general = {"kind": "lm_eval", "tasks": ["colour", "answer"], "include_path": include, "limit": 4}
    config["evaluation"] |= {"general": [general]}
    matrix = run(load_config(config))
    assert set(matrix["general"]) == {"colour", "answer"}
    assert all(len(values) == 2 and None not in values for values in matrix["general"].values())
    assert matrix["summary"]["general_change"] is not None


def test_a_name_that_nobody_knows(include: str, monkeypatch: pytest.MonkeyPatch):
    own = partial(TaskManager, include_defaults=False)  # the library's own thousands take seconds to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    with pytest.raises(ConfigError, match=r"lm_eval knows no task 'colr'; did you mean 'colour'"):
        measures(include, "colr")
