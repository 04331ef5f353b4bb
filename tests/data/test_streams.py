"""Streams by name: their definitions, data in the layouts of the sources, and what is said where one is missing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from holdfast import load_config, run
from holdfast.api.task import Stream
from holdfast.cli import app
from holdfast.config.run import RunConfig
from holdfast.config.stream import DataConfig, StreamConfig
from holdfast.data.load import load_stream
from holdfast.data.streams.definition import find, known
from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.metrics import FIGURES
from holdfast.runner.check import noticed
from holdfast.runner.setup import resolve
from holdfast.scoring import SCORERS
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.doubles import ChatServer, write_sentence_model
from support.paths import GOLDEN, SHARED, needs_shared
from support.tiny import tiny_config, write_model

DATA = SHARED / "data"
VERSIONS = GOLDEN / "streams.json"
TRACE = DATA / "trace" / "LLM-CL-Benchmark_500"
REASONING = DATA / "trace" / "LLM-CL-Benchmark_Reasoning"
O_LORA = DATA / "cl_benchmark"
YAHOO = {"yahoo": str(O_LORA / "substitutes" / "yahoo_2class")}
MEETING_BANK = {"MeetingBank": str(REASONING / "MeetingBank")}  # the other copy has no train split

Rows = list[dict[str, Any]]


def save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def load(data: dict[str, Any] | None = None, **stream: Any) -> Stream:
    config = StreamConfig.model_validate({key: str(v) if isinstance(v, Path) else v for key, v in stream.items()})
    return load_stream(config, DataConfig.model_validate(data or {}))


def names(stream: Stream) -> list[str]:
    return [task.name for task in stream.tasks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented rows of every task of TRACE and O-LoRA, in the sources' layouts."""
    root = tmp_path_factory.mktemp("benchmarks")
    prompt = {"20Minuten": "Simplify.\n\nParagraph:\nLong {n}.\n\nSimplification:"}
    answer = {"C-STANCE": "A", "FOMC": "B", "ScienceQA": "A\nsince"}
    for task in find("trace").tasks:
        rows = [
            {"prompt": prompt.get(task.name, "Question {n}").format(n=n), "answer": answer.get(task.name, "7")}
            for n in range(4)
        ]
        save(root / "trace" / task.name / "train.json", rows[:2])
        save(root / "trace" / task.name / "test.json", rows[2:])
    groups = {}
    for task in find("o_lora").tasks:
        place = root / "cl" / (task.group or task.name) / task.name
        rows = [{"sentence": f"Text: {task.name} {n}\n", "label": "no" if n % 2 else "yes"} for n in range(4)]
        for split, part in (("train", rows[:2]), ("test", rows[2:]), ("labels", ["yes", "no"])):
            save(place / f"{split}.json", part)
        if task.group:
            groups[task.group] = [{"instruction_type": "zero-shot", "instruction": f"Of {task.group}?\n"}]
    save(root / "cl" / "instruction_config.json", groups)
    return root


# --- definitions ---


def test_every_definition_can_be_read_and_is_listed():
    listed = CliRunner().invoke(app, ["streams"]).stdout
    for name, definition in known().items():
        assert f"\n{definition.about}\n" in CliRunner().invoke(app, ["streams", name]).stdout
        assert definition.about in listed
        assert definition.source
    assert set(known()) >= {
        "trace",
        "o_lora",
        "tree_lora",
        "continual_news",
        "realtimeqa",
        "super_ni",
        "chronicle",
        "gallery",
    }
    metrics = CliRunner().invoke(app, ["streams", "--metrics"]).stdout
    assert "trace_exact_match" in metrics
    assert "\njudge " in metrics


@needs_shared
def test_the_orders_of_o_lora_are_those_of_the_source():
    orders, theirs = find("o_lora").orders, read_json(O_LORA / "task_orders.json")
    assert {name: orders[name] for name in theirs} == theirs
    assert orders["order_6"] == orders["long"] == [task.name for task in find("o_lora").tasks]
    assert all(sorted(orders[f"order_{n}"]) == sorted(orders["long"]) for n in (4, 5, 6))


def test_tree_lora_is_trace_and_o_lora_scored_by_prefix():
    tree, trace, o_lora = find("tree_lora"), find("trace"), find("o_lora")
    assert [task.name for task in tree.tasks] == [task.name for task in (*trace.tasks, *o_lora.tasks)]
    assert len(tree.tasks) == 23
    assert len(tree.orders["fifteen"]) == 15
    assert {task.source_metric for task in tree.tasks[8:]} == {"tree_lora_prefix_match"}
    theirs = [task.source_metric for task in tree.tasks[:8]]
    assert theirs[:5] == ["tree_lora_prefix_match"] * 2 + ["tree_lora_rouge_l", None, "tree_lora_first_character"]
    assert theirs[5:] == ["tree_lora_prefix_match"] * 2 + ["trace_sari"]
    assert set(o_lora.orders) < set(tree.orders)


def test_a_change_of_prompt_metric_or_order_changes_the_version(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The definitions as they are, and prompts that code makes: who changes one raises its version and states it."""
    streams = {
        "trace": load(name="trace", path=folder / "trace"),
        "trace, source": load(name="trace", path=folder / "trace", scoring="source"),
        "o_lora": load(name="o_lora", path=folder / "cl"),
        "o_lora, order_4": load(name="o_lora", path=folder / "cl", order="order_4"),
        "tree_lora": load(name="tree_lora", path=folder),
        "chronicle": load(name="chronicle", options={"size": 3}),
        "gallery": load(name="gallery", options={"size": 4}),
    }
    made = {name: value for name, value in read_json(VERSIONS).items() if isinstance(value, list)}
    assert {name: stream.version for name, stream in streams.items()} | made == read_json(VERSIONS)
    assert len({stream.version for stream in streams.values()}) == len(streams)
    version = streams["trace"].version
    assert load({"train_rows": 1}, name="trace", path=folder / "trace").version == version  # rows are no definition
    monkeypatch.setattr(SCORERS["rouge_l"], "version", 2)
    assert load(name="trace", path=folder / "trace").version != version


def test_a_composed_stream_has_a_version_too(folder: Path):
    task = {"name": "a", "path": str(folder / "cl" / "SC" / "yelp")}
    versions = {
        load(tasks=[task | more]).version
        for more in (
            {},
            {"instruction": "Ask."},
            {"prompt": "{labels}: {sentence}"},
            {"metric": "macro_f1"},
            {"beside": ["bleu"]},
            {"max_new_tokens": 4},
        )
    }
    assert len(versions) == 6
    assert load(tasks=[task]).version == load(tasks=[task | {"path": str(folder / "cl" / "SC" / "amazon")}]).version


# --- orders ---


def test_orders_by_name_reversed_shuffled_and_listed(folder: Path):
    trace = [task.name for task in find("trace").tasks]
    path = folder / "trace"
    assert names(load(name="trace", path=path)) == trace
    assert names(load(name="trace", path=path, order="reverse")) == trace[::-1]
    shuffled = names(load(name="trace", path=path, order="random:1"))
    assert shuffled == names(load(name="trace", path=path, order="random:1")) != trace
    assert sorted(shuffled) == sorted(trace)
    assert shuffled != names(load(name="trace", path=path, order="random:2"))
    assert names(load(name="trace", path=path, order=["FOMC", "Py150"])) == ["FOMC", "Py150"]
    assert names(load(name="o_lora", path=folder / "cl", order="order_1")) == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert names(load(path=path, order="reverse")) == sorted(trace, reverse=True)
    assert names(load(path=path, order="random:1")) == random.Random(1).sample(sorted(trace), 8)
    hand = [{"name": n, "path": str(path / "FOMC")} for n in "abc"]
    assert names(load(tasks=hand, order="reverse")) == ["c", "b", "a"]
    assert names(load(name="chronicle", options={"size": 3}, order="reverse")) == ["2025", "2024", "2023", "2022"]
    assert names(load(name="chronicle", options={"size": 3}, order=[2023, 2022])) == ["2023", "2022"]  # YAML's numbers


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("order_9", "unknown order 'order_9'; did you mean 'order_"),
        ("revers", "unknown order 'revers'; did you mean 'reverse'"),
        ("random", "'random' must say its seed, for example random:0"),
        (["agnew"], "unknown task 'agnew'; did you mean 'agnews'"),
        ([], "must name at least one task"),
        (["yelp", "yelp"], "each task once"),
        (7, "must be a list of tasks, reverse"),
        ([["yelp"]], "must be names of tasks"),
    ],
)
def test_orders_that_are_none(folder: Path, tmp_path: Path, order: Any, said: str):
    config = {"model": "m", "output": "o", "stream": {"name": "o_lora", "path": str(folder / "cl"), "order": order}}
    with pytest.raises(ConfigError) as error:
        load_stream(load_config(config).stream, DataConfig())
    assert f"stream.order: {said}" in str(error.value) or said in str(error.value)


# --- prompts and metrics ---


def test_o_lora_asks_as_its_source(folder: Path):
    stream = load(name="o_lora", path=folder / "cl")
    yelp, copa = stream.tasks[0].test[0], stream.tasks[4].test[0]
    assert yelp.question == "Of SC?\nOption: yes, no \nText: yelp 2\n\nAnswer:"
    assert yelp.input == "Text: yelp 2\n"
    assert copa.question == "Text: COPA 2\n\nAnswer:"
    assert {task.metric for task in stream.tasks} == {"accuracy"}
    assert {tuple(task.beside) for task in stream.tasks} == {("o_lora_exact_match",)}
    assert {task.max_new_tokens for task in stream.tasks} == {50}


def test_instructions_lie_above_the_tasks_or_in_a_folder_beside_them(folder: Path, tmp_path: Path):
    (tmp_path / "CL_Benchmark").symlink_to(folder / "cl" / "TC")
    with pytest.raises(
        DataError, match=r"task 'dbpedia': there is no instruction .* o_lora is obtained from CL_Benchm"
    ):
        load(name="o_lora", path=tmp_path, order=["dbpedia"], paths={"dbpedia": str(folder / "cl" / "TC" / "dbpedia")})
    (tmp_path / "configs").mkdir()
    instructions = (folder / "cl" / "instruction_config.json").read_text()
    (tmp_path / "configs" / "instruction_config.json").write_text(instructions)
    stream = load(
        name="o_lora", path=tmp_path, order=["dbpedia"], paths={"dbpedia": str(folder / "cl" / "TC" / "dbpedia")}
    )
    assert stream.tasks[0].test[0].question.startswith("Of TC?\nOption: ")


def test_the_sources_scoring_changes_places_with_the_strict_one(folder: Path):
    strict, source = (load(name="trace", path=folder / "trace", scoring=s) for s in ("strict", "source"))
    assert [(task.metric, task.beside) for task in strict.tasks] == [
        ("choice_letter", ["trace_exact_match"]),
        ("choice_letter", ["trace_exact_match"]),
        ("rouge_l", ["trace_rouge_l"]),
        ("edit_similarity", []),
        ("choice_letter", ["trace_first_character"]),
        ("accuracy", ["trace_exact_match"]),
        ("accuracy", ["trace_exact_match"]),
        ("sari", ["trace_sari"]),
    ]
    for one, other in zip(strict.tasks, source.tasks, strict=True):
        assert [one.metric, *one.beside] == [other.metric, *other.beside][::-1]
    assert strict.tasks[7].test[0].input == "Long 2."


def test_tasks_of_tree_loras_own_archive_hold_their_prompts(tmp_path: Path):
    save(tmp_path / "yelp" / "train.json", [{"prompt": "Of SC? Text: good\nAnswer:", "answer": "positive"}])
    save(tmp_path / "yelp" / "test.json", [{"prompt": "Of SC? Text: bad\nAnswer:", "answer": "negative"}])
    save(tmp_path / "Lima" / "train.json", [{"prompt": "Why?", "answer": "So."}])
    stream = load(name="tree_lora", path=tmp_path, order=["yelp"])
    assert stream.tasks[0].test[0].question == "Of SC? Text: bad\nAnswer:"
    lima = str(tmp_path / "Lima" / "train.json")

    def paths(**given: Any) -> list[Any]:
        """The path of each of two methods that rehearse general texts, after the stream had its say."""
        texts = {"name": "rehearsal", "source": "general"} | given
        stream = {"name": "tree_lora", "path": str(tmp_path), "order": ["yelp"]}
        config = RunConfig(model="m", stream=stream, method=["ewc", "gere_ce", texts], output="o")
        resolved = resolve(config)
        assert resolved.samples == lima
        ewc, *others = resolved.config.method
        assert ewc.options == {}
        return [method.options.get("path") for method in others]

    assert paths() == [lima, lima]
    assert paths(path="mine.txt") == [lima, "mine.txt"]
    assert paths(dataset="mine") == [lima, None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "acuracy"}, "task 'a': metric: unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"beside": ["rouge"]}, "task 'a': beside: unknown metric 'rouge'; did you mean"),
        ({"beside": ["choice_acc"]}, "row 1: metric choice_acc: it offers no choices; give the task labels"),
        ({"metric": "choice_likelihood"}, "row 1: metric choice_likelihood: it offers no choices; give the task lab"),
        ({"metric": "choice_letter"}, "row 1: metric choice_letter: the answer '7' begins with no letter"),
        ({"labels": ["6", "8"]}, "row 1.*: label: '7' is not one of the labels"),
        ({"prompt": "{sentence}"}, "prompt: belongs to sentence_label tasks"),
        ({"metric": "judge"}, r"metric judge: needs evaluation\.judge"),
        ({"input": "nothing(here)"}, "row 1.*: prompt: does not match 'nothing"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_refused_before_training(folder: Path, options: dict[str, Any], said: str):
    with pytest.raises((ConfigError, DataError), match=said):
        load(tasks=[{"name": "a", "path": str(folder / "trace" / "NumGLUE-cm")} | options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "{labels}"}, r"must hold \{sentence\} once"),
        ({"prompt": "{sentense} {sentence}"}, r"must hold \{sentence\} once"),
        ({"input": "no group"}, "must have exactly one group"),
        ({"input": "("}, "is no regular expression"),
    ],
)
def test_prompts_and_inputs_that_cannot_be_used(folder: Path, options: dict[str, Any], said: str):
    task = {"name": "a", "path": "p"} | options
    with pytest.raises(ConfigError, match=said):
        load_config({"model": "m", "output": "o", "stream": {"tasks": [task]}})


# --- where data lie ---


def test_missing_data_say_where_they_are_obtained(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"stream\.path: trace needs the folder of its data, which is obtained from"):
        load(name="trace")
    with pytest.raises(ConfigError, match=r"there is no folder '.*gone'.*realtimeqa is obtained from past/ and"):
        load(name="realtimeqa", path=tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no folder 'C-STANCE' .*stream\.paths\.C-STANCE\); trace is obtained"):
        load(name="trace", path=tmp_path)
    save(tmp_path / "FOMC" / "test.json", [{"prompt": "q", "answer": "A"}])
    with pytest.raises(DataError, match=r"FOMC: task 'FOMC' has no train split; looked for .*; trace is obtained from"):
        load(name="trace", path=tmp_path, order=["FOMC"])
    with pytest.raises(DataError, match=r"task '2022' has no train split; looked for 2022/train\{\.json,.*Continual-N"):
        load(name="continual_news", path=tmp_path)
    for name in ("realtimeqa", "super_ni"):
        with pytest.raises(DataError, match=r"looked for .*; they are obtained from .*https"):
            load(name=name, path=tmp_path)


def test_a_task_may_lie_elsewhere_and_must_not_lie_twice(folder: Path, tmp_path: Path):
    elsewhere = {"yahoo": str(folder / "cl" / "TC" / "agnews")}
    stream = load(name="o_lora", path=folder / "cl", order="order_1", paths=elsewhere)
    assert stream.tasks[2].test[0].question.startswith("Of TC?\nOption: yes, no \nText: agnews")
    for place in ("one", "two"):
        for split in ("train", "test"):
            save(tmp_path / place / "FOMC" / f"{split}.json", [{"prompt": place, "answer": "A"}])
    with pytest.raises(ConfigError, match=r"'FOMC' could be .*one/FOMC or .*two/FOMC; say which \(stream\.paths\.FOMC"):
        load(name="trace", path=tmp_path, order=["FOMC"])
    paths = {"FOMC": str(tmp_path / "two" / "FOMC")}
    assert load(name="trace", path=tmp_path, order=["FOMC"], paths=paths).tasks[0].test[0].question == "two"
    with pytest.raises(ConfigError, match=r"stream\.paths\.FOMK: trace has no such task; did you mean 'FOMC'"):
        load(name="trace", path=tmp_path, paths={"FOMK": "x"})


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ({"name": "trase", "path": "x"}, "unknown stream 'trase'; did you mean 'trace'"),
        ({"name": "chronicle", "path": "x"}, "chronicle needs no data"),
        ({"name": "chronicle", "paths": {"2022": "x"}}, "chronicle does not lie in a folder a task"),
        ({"name": "trace", "path": ".", "options": {"size": 1}}, "stream.options: trace has none"),
        ({"path": ".", "scoring": "source"}, "scoring: only a named stream"),
        ({"path": ".", "tasks": []}, "give name"),
    ],
)
def test_keys_that_do_not_go_together(stream: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        load_stream(load_config({"model": "m", "output": "o", "stream": stream}).stream, DataConfig())


# --- layouts of sources ---


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def test_continual_news_in_year_folders_and_in_the_sources_files(tmp_path: Path):
    rows = {
        year: ([conversation(f"q {year}", f"a {year}")], [conversation(f"one {year}", "1", f"two {year}", "2")])
        for year in (2022, 2023, 2024, 2025)
    }
    for year, (train, test) in rows.items():
        save(tmp_path / "folders" / str(year) / "train.json", train)
        save(tmp_path / "folders" / str(year) / "test.json", test)
        save(tmp_path / "files" / f"{year}.json", train)
        save(tmp_path / "files" / "test_data" / f"{year}-test.json", test)
    folders, files = (load(name="continual_news", path=tmp_path / layout) for layout in ("folders", "files"))
    assert names(folders) == names(files) == ["2022", "2023", "2024", "2025"]
    assert [task.fingerprint for task in folders.tasks] == [task.fingerprint for task in files.tasks]
    first, second = folders.tasks[0].test
    assert (first.question, first.answer, first.number) == ("one 2022", "1", 0)
    assert (second.question, second.answer, second.number) == ("one 2022\n1\ntwo 2022", "2", 1)  # after true answers
    assert (folders.tasks[0].metric, folders.tasks[0].beside) == ("accuracy", [])
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    source = load(name="continual_news", path=tmp_path / "files", scoring="source")
    assert (source.tasks[0].metric, source.tasks[0].beside) == ("semantic_similarity", ["accuracy"])


def question(number: str, text: str, right: int, *choices: str) -> dict[str, Any]:
    ids = {"question_id": number, "question_date": "2001/01/01", "evidence": "<a href='x'>an article</a>"}
    return ids | {"question_sentence": text, "choices": list(choices), "answer": [str(right)]}


def test_realtimeqa_is_learned_as_questions_and_tested_as_a_quiz(tmp_path: Path):
    files = {
        "past/2022/20221230_qa.jsonl": [question("20221230_0", "Who?", 1, "Ann", "Bob", "")],
        "past/2023/20230106_qa.jsonl": [question("20230106_0", "True?", 0, "TRUE", "FALSE")],
        "past/2023/20230106_gcs.jsonl": [{"no": "question"}],
    }
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = load(name="realtimeqa", path=tmp_path)
    assert names(stream) == ["2022", "2023"]  # by the id, not by the date
    [learned], [asked] = stream.tasks[0].train, stream.tasks[0].test
    assert learned.question == "Question: Today is December 30, 2022. Who?\nAnswer:"
    assert asked.question == "Question: Today is December 30, 2022. Who?\nA) Ann\nB) Bob\nAnswer:"
    assert (learned.answer, asked.answer, asked.choices) == ("Bob", "Bob", ("Ann", "Bob"))
    assert (stream.tasks[0].metric, stream.tasks[0].beside) == ("choice_likelihood", ["choice_likelihood_mean"])
    assert stream.tasks[0].asked == "Question: {sentence}Answer:"
    assert read_json(VERSIONS)["realtimeqa"] == [stream.version, stream.tasks[0].fingerprint[:12]]
    (tmp_path / "2024.jsonl").write_text(json.dumps(question("x_1", "Who?", 0, "a", "b")))
    with pytest.raises(
        DataError, match=r"2024\.jsonl: row 1 \(line 1\): question_id: must be YYYYMMDD_NUMBER, not 'x_1"
    ):
        load(name="realtimeqa", path=tmp_path)


def instances(count: int) -> dict[str, Any]:
    rows = [{"id": f"i{n}", "input": f"text {n}", "output": ["POS", "positive"] if n else "NEG."} for n in range(count)]
    return {"Definition": ["Say what is felt"], "Positive Examples": [], "Instances": rows}


def test_super_ni_in_folders_with_splits_and_in_files(tmp_path: Path):
    for split, count in (("train", 3), ("dev", 1), ("test", 2)):
        save(tmp_path / "task363_sst2" / f"{split}.json", instances(count))
    save(tmp_path / "task001_quoref.json", instances(103))
    stream = load(name="super_ni", path=tmp_path)
    assert names(stream) == ["task363_sst2", "task001_quoref"]
    folder, file = stream.tasks
    assert (len(folder.train), len(folder.eval), len(folder.test)) == (3, 1, 2)
    assert (len(file.train), len(file.test)) == (3, 100)
    example = folder.test[1]
    said = "Definition: Say what is felt.\n\nNow complete the following example -\nInput: text 1.\nOutput:"
    assert (example.question, example.input) == (said, "text 1.")
    assert (example.answer, example.also_right) == ("POS", ("positive",))
    assert folder.asked == said.replace("text 1.", "{sentence}")
    assert read_json(VERSIONS)["super_ni"] == [stream.version, folder.fingerprint[:12]]
    assert (folder.metric, folder.beside, folder.max_new_tokens) == ("rouge_l", ["super_ni_rouge_l", "accuracy"], 128)
    bad = instances(2)
    bad["Instances"][1]["output"] = []
    save(tmp_path / "task363_sst2" / "train.json", bad)
    with pytest.raises(DataError, match=r"train\.json: row 2: output: must be a text, or a list of at least one"):
        load(name="super_ni", path=tmp_path)


# --- dirt ---


def test_repeated_contradicting_and_leaking_rows_are_counted(tmp_path: Path):
    row = lambda prompt, answer: {"prompt": prompt, "answer": answer}  # noqa: E731
    save(tmp_path / "a" / "train.json", [row("q", "1"), row("q", "1"), row("q", "2"), row("r", "1"), row("both", "1")])
    save(tmp_path / "a" / "test.json", [row("r", "1"), row("s", "1"), row("s", "1"), row("of b", "1")])
    save(tmp_path / "b" / "train.json", [row("of b", "1"), row("both", "1")])
    save(tmp_path / "b" / "test.json", [row("both", "1"), row("r", "1")])
    a, b = load(path=tmp_path).tasks
    assert noticed(a) == (
        "1 duplicate train rows, 1 test rows stand in train, 1 train rows ask again with another answer, "
        "1 duplicate test rows, 1 test rows stand in the train rows of other tasks"
    )
    assert (b.counts.test_rows_in_train, b.counts.test_rows_in_other_tasks) == (1, 2)


@needs_shared
def test_the_dirt_of_trace_is_counted():
    tasks = ["FOMC", "Py150", "NumGLUE-cm", "NumGLUE-ds"]
    stream = load(name="trace", path=TRACE, order=tasks)
    distinct = [500 - t.counts.duplicate_train_rows - t.counts.contradicting_train_rows for t in stream.tasks]
    assert dict(zip(tasks, distinct, strict=True)) == {"FOMC": 496, "Py150": 482, "NumGLUE-cm": 256, "NumGLUE-ds": 490}
    overlaps = {task.name: task.counts.test_rows_in_train for task in stream.tasks}
    assert overlaps == {"FOMC": 1, "Py150": 5, "NumGLUE-cm": 0, "NumGLUE-ds": 6}  # Py150: of 3 different prompts


# --- runs ---


def test_a_yearly_stream_of_messages_runs_and_keeps_what_is_beside(tmp_path: Path):
    """A format that no benchmark has: a folder a year, messages in .jsonl, dev beside train, several answers a row."""
    write_model(tmp_path / "model")
    chance = random.Random(0)
    for year in (2023, 2024):
        for split, count in (("train", 16), ("dev", 2), ("test", 3)):
            rows = [
                conversation(f"{year} {chance.randrange(100)}?", "yes", "again?", f"no {year}") for _ in range(count)
            ]
            path = tmp_path / "years" / str(year) / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {"name": year, "path": str(tmp_path / "years" / str(year)), "turns": "each", "beside": ["macro_f1", "bleu"]}
        for year in (2023, 2024)
    ]
    config = tiny_config(tmp_path, stream={"tasks": tasks, "order": "reverse"})
    config["training"] |= {"epochs": 2}
    config["evaluation"] = {"bootstrap": 20, "max_new_tokens": 4}
    matrix = run(load_config(config), Progress(quiet=True))
    assert matrix["tasks"] == ["2024", "2023"]
    records = read_jsonl(tmp_path / "run" / "stages" / "01-2024" / "responses" / "2024.jsonl")
    assert [(record["row"], record["number"]) for record in records] == [(n // 2, n % 2) for n in range(6)]
    assert {"macro_f1", "bleu"} == set(records[0]["beside"])
    assert {len(values) for values in matrix["beside"]["2023"].values()} == {3}
    info = read_json(tmp_path / "run" / "run.json")
    assert info["stream"] == {"name": "tasks", "version": load(tasks=tasks, order="reverse").version}
    assert "tasks, version " + info["stream"]["version"] in (tmp_path / "run" / "report.html").read_text()
    plain = load(path=tmp_path / "years")
    assert names(plain) == ["2023", "2024"]
    assert [len(task.eval) for task in plain.tasks] == [2, 2]
    assert {example.answer for example in plain.tasks[0].test} == {"no 2023"}


def test_a_similarity_is_reported_with_its_floor(folder: Path, tmp_path: Path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    write_model(tmp_path / "model")
    task = {"name": "a", "path": str(folder / "trace" / "NumGLUE-cm"), "metric": "semantic_similarity"}
    config = tiny_config(tmp_path, stream={"tasks": [task]})
    model = str(write_sentence_model(tmp_path / "sentences"))
    config["evaluation"] = {"max_new_tokens": 2, "bootstrap": 0, "similarity_model": model}
    matrix = run(load_config(config), Progress(quiet=True))
    assert matrix["floors"] == {"a": matrix["scores"][0][0]}
    assert "only what is above this floor was learned" in (tmp_path / "run" / "report.html").read_text()


def test_metrics_that_are_no_means_and_choices_run(folder: Path, tmp_path: Path):
    write_model(tmp_path / "model")
    path = str(folder / "cl" / "SC" / "yelp")
    tasks = [{"name": m, "path": path, "metric": m} for m in ("macro_f1", "choice_likelihood")]
    tasks[1]["beside"] = ["choice_likelihood_mean", "choice_acc"]
    config = tiny_config(tmp_path, stream={"tasks": tasks}, method="frozen")
    matrix = run(load_config(config), Progress(quiet=True))
    assert set(matrix["intervals"]) == set(FIGURES)
    records = read_jsonl(tmp_path / "run" / "stages" / "00-start" / "responses" / "choice_likelihood.jsonl")
    for record in records:
        assert record["choices"] == ["yes", "no"]
        assert record["response"] == record["choices"][record["choice_nats"].index(min(record["choice_nats"]))]
        assert record["score"] == float(record["response"] == record["answer"])
        bare = record["bare_choice_nats"]
        assert all(less < more for less, more in zip(bare, record["choice_nats"], strict=True))
        picked = record["choices"][bare.index(min(bare))]
        assert record["beside"]["choice_acc"] == float(picked == record["answer"])
    right = sum(record["score"] for record in records) / len(records)
    assert matrix["scores"][0][1] == right


def real_run(tmp_path: Path, stream: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": str(DATA / "models" / "stories260K" / "hf"),
        "tuner": "lora",
        "stream": stream,
        "data": {"train_rows": 4, "test_rows": 2, "long_answers": "cut"},
        "training": {"max_steps": 1, "batch_size": 4},
        "evaluation": {"max_new_tokens": 4, "bootstrap": 10},
        "output": str(tmp_path / "run"),
    }
    for key, values in changes.items():
        config[key] = config.get(key, {}) | values
    return run(load_config(config), Progress(quiet=True))


@needs_shared
def test_trace_runs_on_a_pretrained_model_with_a_handful_of_rows(tmp_path: Path):
    order = ["20Minuten", "ScienceQA", "FOMC"]
    matrix = real_run(tmp_path, {"name": "trace", "path": str(TRACE), "order": order, "scoring": "source"})
    assert list(matrix["metrics"].values()) == ["trace_sari", "trace_first_character", "trace_exact_match"]
    assert all(score is not None for row in matrix["scores"] for score in row)
    assert set(matrix["beside"]) == set(order)
    assert read_json(tmp_path / "run" / "run.json")["cut_answers"] > 0


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    "stream",
    [
        {"name": "trace", "path": str(TRACE), "paths": MEETING_BANK},
        {"name": "trace", "path": str(TRACE), "paths": MEETING_BANK, "scoring": "source", "order": "reverse"},
        *({"name": "o_lora", "path": str(O_LORA), "paths": YAHOO, "order": f"order_{n}"} for n in range(1, 7)),
        {"name": "tree_lora", "path": str(DATA), "paths": YAHOO | MEETING_BANK, "order": "fifteen"},
        {"name": "realtimeqa", "path": str(DATA / "realtimeqa")},
    ],
    ids=lambda stream: f"{stream['name']}-{stream.get('order', '')}-{stream.get('scoring', '')}",
)
def test_benchmarks_run_from_the_real_data(tmp_path: Path, stream: dict[str, Any]):
    matrix = real_run(tmp_path, stream, data={"train_rows": 8, "test_rows": 4}, training={"max_steps": 2})
    assert len(matrix["tasks"]) == len(matrix["scores"]) - 1
    assert all(score is not None for row in matrix["scores"] for score in row)
    assert matrix["summary"]["average"] is not None


@pytest.mark.slow
@needs_shared
def test_every_scorer_runs_on_real_rows(tmp_path: Path):
    choices = {"choice_letter", "choice_acc", "choice_likelihood", "choice_likelihood_mean"}
    answered = [metric for metric in SCORERS if metric not in ("preference", "judged_likelihood")]
    answered = [metric for metric in answered if "iou" not in metric]  # no answer of these rows is a box
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("pycocoevalcap", reason="pip install 'holdfast[images]'")
    server = ChatServer(lambda body, number: "correct" if number % 2 else "incorrect")
    judge = {"url": server.url, "model": "judge", "concurrency": 1}
    similarity = str(write_sentence_model(tmp_path / "sentences"))
    tasks = [
        {
            "name": metric,
            "path": str(TRACE / ("FOMC" if metric in choices else "20Minuten" if "sari" in metric else "NumGLUE-ds")),
            "metric": metric,
        }
        | ({"labels": ["A", "B", "C"]} if metric in choices else {})
        | ({"input": r"(?s)Paragraph:\n(.*)\n\nSimplification:"} if metric == "sari" else {})
        for metric in answered
    ]
    changes = {"method": {"name": "frozen"}, "evaluation": {"judge": judge, "similarity_model": similarity}}
    matrix = real_run(tmp_path, {"tasks": tasks}, **changes)
    server.close()
    assert matrix["metrics"] == {metric: metric for metric in answered}
    assert all(score is not None for score in matrix["scores"][0])
    assert matrix["scores"][0][answered.index("judge")] == 0.5


def test_a_run_is_not_continued_by_another_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(tiny_config(tmp_path, method="frozen"))
    run(config, Progress(quiet=True))
    run(config, Progress(quiet=True))
    monkeypatch.setattr(SCORERS["accuracy"], "version", 2)
    with pytest.raises(
        RunDirectoryError, match="changed since this run began:\n  the prompts or metrics of its stream: version"
    ):
        run(config, Progress(quiet=True))
