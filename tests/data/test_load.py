"""Streams from configurations: which tasks, in which order, with which instruction, and what is odd about them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from holdfast.api.task import Stream, Task
from holdfast.config.evaluation import EvaluationConfig, GeneralConfig
from holdfast.config.stream import DataConfig, StreamConfig, TaskConfig
from holdfast.data.load import load_stream
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.abilities import load_general
from support.paths import SHARED, needs_shared

ORDERS = SHARED / "data" / "cl_benchmark"
TRACE = SHARED / "data" / "trace" / "LLM-CL-Benchmark_500"


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


def save(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, values in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(values))
    return folder


def add(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name, train=rows((f"{name} q", "a")), test=rows((f"{name} t", "a")))
    return root


def load(data: DataConfig | None = None, **stream: Any) -> Stream:
    return load_stream(StreamConfig.model_validate(stream), data or DataConfig())


def task(data: DataConfig | None = None, **config: Any) -> Task:
    return load(data, tasks=[{"name": "x"} | config]).tasks[0]


def names(stream: Stream) -> list[str]:
    return [task.name for task in stream.tasks]


# --- folders ---


def test_folders_at_any_depth_are_tasks_in_sorted_order(tmp_path: Path) -> None:
    add(tmp_path / "s", "b", "deep/er/a", "group/c")
    save(tmp_path / "s" / "no_task", labels=["x"], eval=rows(("q", "a")))
    stream = load(path=str(tmp_path / "s"))
    assert (stream.name, names(stream)) == ("s", ["a", "b", "c"])
    assert stream.tasks[0].train[0].question == "deep/er/a q"
    assert names(load(path=str(tmp_path / "s"), order=["c", "a"])) == ["c", "a"]


def test_relative_paths_start_at_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "s", "a")
    monkeypatch.chdir(tmp_path)
    assert names(load(path="s")) == ["a"]
    assert task(path="s/a").train[0].file == "s/a/train.json"


def test_order_refuses_unknown_and_ambiguous_names(tmp_path: Path) -> None:
    add(tmp_path, "old/news", "new/news", "dbpedia", "top", "old/top")
    with pytest.raises(ConfigError, match="no task 'dbpeda'; did you mean 'dbpedia'"):
        load(path=str(tmp_path), order=["dbpeda"])
    with pytest.raises(ConfigError, match=r"'news' could be \./new/news or \./old/news"):
        load(path=str(tmp_path), order=["news"])
    with pytest.raises(ConfigError, match=r"'top' could be \./old/top or \./top"):
        load(path=str(tmp_path), order=["top"])
    stream = load(path=str(tmp_path), order=["./top", "old/news"])
    assert names(stream) == ["top", "news"]
    assert [t.train[0].question for t in stream.tasks] == ["top q", "old/news q"]
    assert names(load(path=str(tmp_path), order=["old/news", "dbpedia", "new/news"])) == [
        "old-news",
        "dbpedia",
        "new-news",
    ]
    assert names(load(path=str(tmp_path))) == ["dbpedia", "new-news", "old-news", "old-top", "top"]


def test_paths_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*gone"):
        load(path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no folder below it holds a train or test file"):
        load(path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no folder .*gone"):
        task(path=str(tmp_path / "gone"))


@pytest.mark.parametrize(("missing", "looked"), [("train", "train.json, "), ("test", "test.json, ")])
def test_a_missing_split_says_what_was_looked_for(tmp_path: Path, missing: str, looked: str) -> None:
    splits = {name: rows((name, "a")) for name in ("train", "test", "dev") if name != missing}
    save(tmp_path / "t", **splits)
    with pytest.raises(DataError) as error:
        load(path=str(tmp_path))
    assert f"has no {missing} split; looked for {looked}" in str(error.value)
    assert ".parquet" in str(error.value)


@pytest.mark.parametrize("stem", ["eval", "dev", "validation"])
def test_eval_has_three_names(tmp_path: Path, stem: str) -> None:
    save(tmp_path, train=rows(("q", "a")), test=rows(("t", "a")), **{stem: rows(("e", "a"))})
    assert [example.question for example in task(path=str(tmp_path)).eval] == ["e"]


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    save(tmp_path, train=rows(("q", "a")), test=rows(("t", "a")), dev=rows(("e", "a")), eval=rows(("e", "a")))
    with pytest.raises(DataError, match=r"dev\.json and eval\.json"):
        task(path=str(tmp_path))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    save(tmp_path, train=rows(("q", "a")), test=[])
    with pytest.raises(DataError, match=r"test\.json: holds no rows"):
        task(path=str(tmp_path))


# --- instructions, labels, metrics ---


def label_task(folder: Path, **files: Any) -> Path:
    sentences = {split: [{"sentence": f"{split} words", "label": "good"}] for split in ("train", "test")}
    return save(folder, **(sentences | {"labels": ["good", "bad"]} | files))


def test_the_instruction_of_the_group_is_the_zero_shot_one(tmp_path: Path) -> None:
    label_task(tmp_path / "SC" / "yelp")
    label_task(tmp_path / "COPA" / "copa")
    entries = [("few-shot", "Look at these."), ("zero-shot", "What is it?\n"), ("zero-shot", "Second.")]
    config = {"SC": [{"instruction_type": kind, "instruction": text} for kind, text in entries]}
    save(tmp_path, instruction_config=config)
    copa, yelp = load(path=str(tmp_path)).tasks
    assert yelp.train[0].question == "What is it?\nOption: good, bad\ntrain words\nAnswer:"
    assert copa.train[0].question == "train words\nAnswer:"
    assert yelp.labels == ["good", "bad"]
    (tmp_path / "SC" / "yelp" / "instruction.txt").write_text("Mine.\n")
    assert load(path=str(tmp_path)).tasks[1].train[0].question.startswith("Mine.\nOption: ")
    assert task(path=str(tmp_path / "SC/yelp"), instruction="Yours.").train[0].question.startswith("Yours.\nOption: ")


def test_a_malformed_instruction_config_is_refused(tmp_path: Path) -> None:
    label_task(tmp_path / "SC" / "yelp")
    save(tmp_path, instruction_config={"SC": "What is it?"})
    with pytest.raises(DataError, match=r"instruction_config\.json: must map"):
        load(path=str(tmp_path))


def test_an_instruction_for_rows_that_hold_their_own_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"belongs to sentence_label tasks; .* prompt_answer"):
        task(path=str(tmp_path / "a"), instruction="Do it.")


@pytest.mark.parametrize("labels", ["good", [], ["good", 1], ["good", "good "], {"good": 1}])
def test_labels_are_an_array_of_different_strings(tmp_path: Path, labels: Any) -> None:
    label_task(tmp_path, labels=labels)
    with pytest.raises(DataError, match=r"labels\.json: "):
        task(path=str(tmp_path))


def test_a_sentence_label_folder_needs_labels(tmp_path: Path) -> None:
    (label_task(tmp_path) / "labels.json").unlink()
    with pytest.raises(DataError, match=r"labels\.json: is missing"):
        task(path=str(tmp_path))


def test_a_label_outside_labels_json_names_file_and_row(tmp_path: Path) -> None:
    label_task(tmp_path, test=[{"sentence": "s", "label": "good"}, {"sentence": "s", "label": "goood"}])
    with pytest.raises(DataError, match=r"test\.json: row 2 .*'goood' .*\(good, bad\); did you mean 'good'"):
        task(path=str(tmp_path))


def test_the_metric_follows_the_format_unless_named(tmp_path: Path) -> None:
    path = str(add(tmp_path, "a") / "a")
    text = str(save(tmp_path / "text", train=[{"text": "one"}], test=[{"text": "two"}]))
    assert task(path=path).metric == "accuracy"
    assert task(path=text).metric == "loss"
    assert task(path=path, metric="rouge_l").metric == "rouge_l"
    with pytest.raises(ConfigError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        task(path=path, metric="acuracy")
    with pytest.raises(ConfigError, match="accuracy needs answers"):
        task(path=text, metric="accuracy")


def test_a_named_format_wins_over_the_keys(tmp_path: Path) -> None:
    both = [{"prompt": "p", "answer": "a", "text": "t"}]
    save(tmp_path, train=both, test=both)
    assert task(path=str(tmp_path), format="text").train[0].text == "t"
    assert task(path=str(tmp_path)).train[0].answer == "a"
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        task(path=str(tmp_path), format="txt")


def test_columns_are_renamed_and_rows_keep_their_lines(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "q", "gold": "a"}\n\n{"question": "r", "gold": ""}\n')
    columns = {"question": "prompt", "gold": "answer"}
    with pytest.raises(DataError, match=r"row 2 \(line 3\): answer: is empty"):
        task(path=str(tmp_path), columns=columns)
    assert task(DataConfig(train_rows=1, test_rows=1), path=str(tmp_path), columns=columns).train[0].answer == "a"
    with pytest.raises(DataError, match="no column 'qestion'; did you mean 'question'"):
        task(path=str(tmp_path), columns={"qestion": "prompt"})
    with pytest.raises(DataError, match="a column 'gold' already"):
        task(path=str(tmp_path), columns={"question": "gold"})


# --- limits, counts, overlap, fingerprints ---


def overlapping(folder: Path) -> str:
    train = rows(("1", "a"), ("1", "a"), ("1", "b"), ("2", "c"), ("3", "d"), ("1", "a"))
    test = rows(("9", "a"), ("1", "zzz"), ("3", "d"), ("3", "e"))
    return str(save(folder, train=train, test=test))


def test_limits_take_the_first_rows_and_count_only_those(tmp_path: Path) -> None:
    found = task(DataConfig(train_rows=4, test_rows=2), path=overlapping(tmp_path))
    assert [e.question for e in found.train] == ["1", "1", "1", "2"]
    assert [e.question for e in found.test] == ["9", "1"]
    assert (found.counts.duplicate_train_rows, found.counts.test_rows_in_train) == (1, 1)


def test_overlap_warns_by_default_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "holdfast"):
        found = task(path=overlapping(tmp_path))
    assert (found.counts.duplicate_train_rows, found.counts.test_rows_in_train) == (2, 3)
    assert (found.counts.dropped_train_rows, len(found.train)) == (0, 6)
    [record] = caplog.records
    assert "3 of 4 test rows" in record.getMessage()
    assert "test.json: row 2" in record.getMessage()


def test_overlap_can_stop_the_load_or_leave_train(tmp_path: Path) -> None:
    path = overlapping(tmp_path / "some")
    with pytest.raises(DataError, match=r"3 of 4 test rows .*test\.json: row 2; .*on_overlap"):
        task(DataConfig(on_overlap="error"), path=path)
    found = task(DataConfig(on_overlap="drop"), path=path)
    assert [e.question for e in found.train] == ["2"]
    assert (found.counts.test_rows_in_train, found.counts.dropped_train_rows) == (3, 5)
    everything = save(tmp_path / "all", train=rows(("1", "a")), test=rows(("1", "b")))
    with pytest.raises(DataError, match="none is left"):
        task(DataConfig(on_overlap="drop"), path=str(everything))


def test_a_sample_is_taken_at_even_distances_once_everything_is_counted(tmp_path: Path) -> None:
    test = rows(*((str(n), "a") for n in range(10)))
    path = str(save(tmp_path, train=rows(("0", "a"), ("5", "b"), ("x", "a")), test=test))

    def measured(count: int | None):
        config = StreamConfig(tasks=[TaskConfig(name="one", path=path)])
        return load_stream(config, DataConfig(on_overlap="drop"), EvaluationConfig(rows=count)).tasks[0]

    places = {count: [example.row for example in measured(count).test] for count in (1, 2, 3, 10, 11, None)}
    assert places == {1: [5], 2: [2, 7], 3: [1, 5, 8], 10: [*range(10)], 11: [*range(10)], None: [*range(10)]}
    assert [e.question for e in measured(2).train] == ["x"], "rows that are not measured are test rows, too"
    assert measured(2).notes == ["2 of its 10 test rows are measured (evaluation.rows)"] and not measured(10).notes
    assert len({measured(count).fingerprint for count in (2, 3, 10, None)}) == 3


def test_the_fingerprint_is_of_the_content_in_order(tmp_path: Path) -> None:
    a, b = rows(("1", "a")), rows(("2", "b"))
    base = task(path=str(save(tmp_path / "base", train=a + b, test=rows(("3", "c"))))).fingerprint
    assert len(bytes.fromhex(base)) == hashlib.sha256().digest_size
    moved = task(path=str(save(tmp_path / "moved", train=a + b, test=rows(("3", "c")))), name="other")
    turned = task(path=str(save(tmp_path / "turned", train=b + a, test=rows(("3", "c")))))
    split = task(path=str(save(tmp_path / "split", train=a, test=[*b, *rows(("3", "c"))])))
    answer = task(path=str(save(tmp_path / "answer", train=a + b, test=rows(("3", "d")))))
    assert moved.fingerprint == base
    assert len({base, turned.fingerprint, split.fingerprint, answer.fingerprint}) == 4


# --- lists of tasks ---


def test_tasks_composed_by_hand_are_ordered_and_named_once(tmp_path: Path) -> None:
    add(tmp_path, "a", "b")
    entries = [{"name": name, "path": str(tmp_path / folder)} for name, folder in [("one", "a"), ("two", "b")]]
    assert names(load(tasks=entries)) == ["one", "two"]
    assert names(load(tasks=entries, order=["two"])) == ["two"]
    with pytest.raises(ConfigError, match="unknown task 'tow'; did you mean 'two'"):
        load(tasks=entries, order=["tow"])
    with pytest.raises(ConfigError, match="two tasks are called 'one'"):
        load(tasks=[entries[0], entries[1] | {"name": "one"}])
    with pytest.raises(ConfigError, match=r"cannot be called '\.\./one'"):
        load(tasks=[entries[0] | {"name": "../one"}])
    with pytest.raises(ConfigError, match=r"stream\.options"):
        load(tasks=entries, options={"size": 3})


# --- built-in streams ---


def test_chronicle_takes_options_and_order() -> None:
    stream = load(name="chronicle", options={"size": 4, "years": [2022, 2023]}, order=["2023"])
    assert (stream.name, names(stream)) == ("chronicle", ["2023"])
    assert stream.general
    limited = load(DataConfig(train_rows=3, test_rows=2), name="chronicle", options={"size": 4})
    assert {(len(t.train), len(t.test)) for t in limited.tasks} == {(3, 2)}
    assert limited.tasks[1].fingerprint != stream.tasks[0].fingerprint


def test_unknown_streams_options_and_years_are_refused_with_the_near_name() -> None:
    with pytest.raises(ConfigError, match="'chronicles'; did you mean 'chronicle'"):
        load(name="chronicles")
    with pytest.raises(ConfigError, match=r"options\.sizes.*did you mean 'size'"):
        load(name="chronicle", options={"sizes": 3})
    with pytest.raises(ConfigError, match="unknown task '2032'; did you mean '20"):
        load(name="chronicle", options={"size": 4}, order=["2032"])


# --- Hugging Face datasets ---


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(text=datasets.Value("string"), verdict=datasets.ClassLabel(names=["bad", "good"]))
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, verdicts in (("train", [1, 0, 1]), ("validation", [0]), ("test", [0, 1])):
        texts = [f"{split} {i}" for i in range(len(verdicts))]
        made = datasets.Dataset.from_dict({"text": texts, "verdict": verdicts}, features=features)
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_dataset_of_class_labels_becomes_sentences_with_label_names(local_dataset: Path) -> None:
    columns = {"text": "sentence", "verdict": "label"}
    found = task(dataset=str(local_dataset), columns=columns, instruction="How is it?")
    assert found.labels == ["bad", "good"]
    assert [e.answer for e in found.train] == ["good", "bad", "good"]
    assert found.test[1].question == "How is it?\nOption: bad, good\ntest 1\nAnswer:"
    assert (len(found.eval), found.metric) == (1, "accuracy")
    assert task(dataset=str(local_dataset), columns={"text": "prompt", "verdict": "answer"}).test[0].answer == "bad"


def test_numbers_of_a_dataset_without_class_labels_are_indices_of_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [2, 0, 1]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "colours")
    with pytest.raises(DataError, match=r"colours\[train\]: row 1: label: is a number \(2\) without a name"):
        task(dataset=str(tmp_path / "colours"))
    found = task(dataset=str(tmp_path / "colours"), labels=["red", "blue", "green"])
    assert [e.answer for e in found.train] == ["green", "red", "blue"]


def test_a_dataset_that_cannot_be_used_is_named(local_dataset: Path) -> None:
    next(local_dataset.glob("test*")).unlink()
    with pytest.raises(DataError, match="has no test split, but train, validation"):
        task(dataset=str(local_dataset), columns={"text": "prompt", "verdict": "answer"})
    with pytest.raises(DataError, match=r"'x': dataset: .* cannot be loaded"):
        task(dataset=str(local_dataset / "gone"))


# --- general ability ---


def general(path: Path, **config: Any) -> Any:
    configs = [GeneralConfig.model_validate({"name": "g", "path": str(path)} | config)]
    return load_general(configs, Stream("s", []))[0]


def test_texts_come_from_lines_or_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert general(tmp_path / "a.txt").texts == ["one", "two", "three"]
    assert general(tmp_path / "a.txt", rows=2).texts == ["one", "two"]
    assert general(tmp_path / "a.jsonl").texts == ["one", "two"]
    with pytest.raises(DataError, match=r"b\.jsonl: row 1 \(line 1\): text: is missing"):
        (tmp_path / "b.jsonl").write_text('{"txt": "one"}\n')
        general(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.txt: holds no text"):
        (tmp_path / "b.txt").write_text("\n")
        general(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("answer", "index"),
    [(0, 0), (2, 2), ([1], 1), (["2"], 2), ("2", 2), ("B", 1), ("c", 2), ("red", 0), (" blue ", 2)],
)
def test_answers_are_indices_letters_or_texts(tmp_path: Path, answer: Any, index: int) -> None:
    row = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": answer}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert general(tmp_path / "a.json", kind="choices").questions == [("Which?", row["choices"], index)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "names no choice"),
        ({"answer": -1}, "names no choice"),
        ({"answer": True}, "names no choice"),
        ({"answer": None}, "names no choice"),
        ({"answer": ["0", "1"]}, "names no choice"),
        ({"answer": "D"}, "names no choice"),
        ({"answer": "A", "choices": ["B", "A"]}, "could be two choices"),
        ({"answer": "1", "choices": ["0", "2", "1"]}, "could be two choices"),
        ({"answer": "x", "choices": ["x", "x"]}, "could be two choices"),
        ({"choices": ["one"]}, "choices: must be at least two"),
        ({"choices": ["one", " "]}, "choices: must be at least two"),
        ({"choices": ["", "one", "two"]}, "choices: must be at least two texts, the right one among them"),
        ({"choices": ["one", 2]}, "choices: must be a list"),
        ({"question": ""}, "question: must be text"),
    ],
)
def test_bad_questions_name_file_and_row(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    good = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": 0}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [good, good | change])))
    with pytest.raises(DataError, match=rf"a\.jsonl: row 2 \(line 2\): .*{said}|a\.jsonl: row 2 \(line 2\): {said}"):
        general(tmp_path / "a.jsonl", kind="choices")


def test_blank_choices_are_none(tmp_path: Path) -> None:
    row = {"question_sentence": "Which?", "choices": ["red", "", "blue"], "answer": ["2"]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert general(tmp_path / "a.json", kind="choices").questions == [("Which?", ["red", "blue"], 1)]


def test_measures_default_to_those_of_the_stream_and_are_named_once() -> None:
    stream = load(name="chronicle", options={"size": 4})
    assert load_general(None, stream) == stream.general
    assert load_general([], stream) == []
    twice = [GeneralConfig(name="g", path="a.txt"), GeneralConfig(name="g", path="b.txt")]
    with pytest.raises(ConfigError, match="two measures are called 'g'"):
        load_general(twice, stream)


# --- real data ---


@needs_shared
def test_the_o_lora_benchmark_loads_in_its_first_order() -> None:
    stream = load(path=str(ORDERS), order=["dbpedia", "amazon", "agnews", "yelp"])
    assert [(len(t.train), len(t.test)) for t in stream.tasks] == [(1000, 200)] * 4
    dbpedia = stream.tasks[0]
    assert len(dbpedia.labels or []) == 14
    assert dbpedia.train[0].question.startswith("What is the topic of the following paragraph? Choose one")
    assert "\nOption: Company, Educational Institution, " in dbpedia.train[0].question
    assert all(e.turns[0].content[slice(*e.turns[0].cut)] in e.question for e in dbpedia.train if e.turns[0].cut)


@needs_shared
def test_copa_asks_itself_and_wic_answers_in_strings() -> None:
    copa, wic = load(path=str(ORDERS), order=["COPA", "WiC"]).tasks
    assert copa.train[0].question.startswith("Which sentence is the ")
    assert "Option:" not in copa.train[0].question
    assert {e.answer for e in wic.train} == {"True", "False"}


@needs_shared
def test_a_label_that_stands_for_no_agreement_stops_the_load() -> None:
    with pytest.raises(DataError, match=r"MNLI.test\.json: row \d+ \(line \d+\): label: '-' is not one of the labels"):
        load(path=str(ORDERS), order=["MNLI"])


@needs_shared
@pytest.mark.parametrize("name", ["FOMC", "NumGLUE-cm", "NumGLUE-ds", "Py150", "C-STANCE", "20Minuten"])
def test_duplicates_and_overlap_of_trace_are_counted(name: str) -> None:
    found = load(path=str(TRACE), order=[name]).tasks[0]
    train, test = (json.loads((TRACE / name / f"{split}.json").read_text("utf-8")) for split in ("train", "test"))
    prompts = {row["prompt"] for row in train}
    distinct = {"FOMC": 496, "NumGLUE-cm": 256, "Py150": 482}
    assert len(prompts) == distinct.get(name, len(prompts))
    pairs = {(row["prompt"], row["answer"].strip()) for row in train}
    assert found.counts.duplicate_train_rows == 500 - len(pairs)
    assert found.counts.test_rows_in_train == sum(row["prompt"] in prompts for row in test)
    shared = {row["prompt"] for row in test} & prompts
    assert len(shared) == {"FOMC": 1, "NumGLUE-ds": 6, "Py150": 3}.get(name, 0)
    dropped = load(DataConfig(on_overlap="drop"), path=str(TRACE), order=[name]).tasks[0]
    assert dropped.counts.dropped_train_rows == sum(row["prompt"] in shared for row in train)


@needs_shared
def test_trace_without_a_train_split_says_so() -> None:
    with pytest.raises(DataError, match="'MeetingBank' has no train split"):
        load(path=str(TRACE), order=["MeetingBank"])


@needs_shared
def test_real_questions_with_choices() -> None:
    for name, count in (("realtimeqa/2022", None), ("realtimeqa/2023", None), ("mmlu/test", 57 * 20)):
        path = SHARED / "data" / f"{name}.jsonl"
        raw = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found = general(path, kind="choices")
        assert len(found.questions) == len(raw) == (count or len(raw))
        for (question, choices, right), row in zip(found.questions, raw, strict=True):
            answer = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
            assert question == row.get("question", row.get("question_sentence"))
            assert choices[right] == row["choices"][int(answer)]


@needs_shared
def test_real_texts_and_alpaca_rows(tmp_path: Path) -> None:
    assert len(general(SHARED / "data/general/c4_demo.jsonl").texts) == 300
    assert len(general(SHARED / "data/general/wiki_demo.txt").texts) == 30
    for name in ("ARC-Easy", "boolq"):
        found = load(path=str(SHARED / "data/multiple_choice"), order=[name]).tasks[0]
        assert (len(found.train), len(found.test)) == (500, 300)
        assert found.train[0].answer.startswith("the correct answer is ")


def test_many_rows_that_cannot_be_used_are_listed_beside_the_output(tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {number}", "answer": "" if number < 25 else "yes"} for number in range(30)]
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        (tmp_path / "task" / f"{split}.json").write_text(json.dumps(rows[25:] if split == "test" else rows))
    config = StreamConfig(path=str(tmp_path / "task"))
    with pytest.raises(DataError, match="and 5 more; all of them are in ") as raised:
        load_stream(config, DataConfig(), output=tmp_path / "runs" / "first")
    listed = tmp_path / "runs" / "first.bad-rows.txt"
    assert str(raised.value).endswith(str(listed)) and len(listed.read_text().splitlines()) == 25
    with pytest.raises(DataError, match=r"and 5 more$"):
        load_stream(config, DataConfig())
