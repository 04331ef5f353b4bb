"""A whole run on tiny tasks: what it writes, what chains from stage to stage, what a reference method means."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import __version__, load_config, run
from holdfast.api.task import Task
from holdfast.errors import RunDirectoryError
from holdfast.metrics.summary import summarize
from holdfast.runner import matrix as matrices
from holdfast.runner.load import trained_weights
from holdfast.scoring import find
from holdfast.scoring.match import accuracy
from holdfast.system.files import read_json, read_jsonl, write_jsonl
from holdfast.system.progress import Progress
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def scored():
    """The files of responses that the finished run read for its matrices, each as often as it did."""
    return []


@pytest.fixture(scope="module")
def finished(scored, tmp_path_factory):
    """A finished run with replay and EWC, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "general.txt").write_text("red and green\nblue is not red\n")
    config = tiny_config(folder, method=["replay", {"name": "ewc", "strength": 0.1, "samples": 4}])
    config["evaluation"]["general"] = [{"name": "colours", "path": str(folder / "general.txt")}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "read_jsonl", lambda path: [scored.append(path), read_jsonl(path)][1])
        return run(config, QUIET), folder / "run", config


def test_responses_are_read_once_for_all_matrices(scored, finished):
    assert sorted(scored) == sorted((finished[1] / "stages").glob("*/responses/*.jsonl")) and len(scored) == 12


def test_what_it_returns_is_matrix_json_and_follows_from_the_responses(finished):
    matrix, directory, _ = finished
    assert matrix == read_json(directory / "matrix.json")
    assert matrix["tasks"] == ["red", "green", "blue"] and len(matrix["scores"]) == 4
    folders = ["00-start", "01-red", "02-green", "03-blue"]
    for t, folder in enumerate(folders):
        for j, task in enumerate(matrix["tasks"]):
            records = read_jsonl(directory / "stages" / folder / "responses" / f"{task}.jsonl")
            assert [r["score"] for r in records] == [accuracy(r["response"], r["answer"]) for r in records]
            assert matrix["scores"][t][j] == pytest.approx(sum(r["score"] for r in records) / len(records))
    expected = summarize(matrix["scores"], metrics=matrix["metrics"], general=matrix["general"])
    assert matrix["summary"] == expected
    assert matrix["scores"][1][0] > matrix["scores"][0][0]
    assert len(matrix["general"]["perplexity/colours"]) == 4 and matrix["summary"]["general_change"] is None
    low, high = matrix["intervals"]["average"]
    assert low <= matrix["summary"]["average"] <= high


def test_responses_that_were_written_again_are_read_again(finished, tmp_path):
    file = tmp_path / "responses" / "red.jsonl"
    file.parent.mkdir()
    rows = read_jsonl(finished[1] / "stages" / "03-blue" / "responses" / "red.jsonl")
    files, task, scorer = matrices.MeasuredFiles(), Task("red", "accuracy", [], []), find("accuracy")
    for score in (1.0, 0.0):
        write_jsonl(file, [row | {"score": score} for row in rows])
        assert files.read(file, task, scorer).score == score


def test_events_name_every_term_and_their_sum_is_the_loss(finished):
    _, directory, _ = finished
    events = read_jsonl(directory / "events.jsonl")
    assert [(e["stage"], e["step"]) for e in events] == [(s, k) for s in (1, 2, 3) for k in range(1, 19)]
    for event in events:
        assert set(event["terms"]) == ({"task"} if event["stage"] == 1 else {"task", "replay", "ewc"})
        assert event["loss"] == pytest.approx(sum(event["terms"].values()), rel=1e-4)
    assert events[-1]["terms"]["ewc"] > 0


def test_run_json_says_what_made_the_numbers(finished):
    _, directory, config = finished
    record = read_json(directory / "run.json")
    settled = load_config(config).model_dump(mode="json")  # of a narrow model, auto is float32
    settled["model"]["dtype"] = settled["training"]["precision"] = "float32"
    assert record["config"] == settled
    assert record["versions"]["holdfast"] == __version__
    assert torch.__version__.startswith(record["versions"]["torch"])  # what was built for CUDA says so in its own
    assert record["tasks"]["red"]["train"] == 24 and record["tasks"]["red"]["test_rows_in_train"] == 1
    assert record["finished"] is not None and record["seconds"]["train"] > 0
    assert record["parameters"]["total"] == record["parameters"]["trainable"] > 0


def test_weights_load_with_plain_transformers_and_nothing_else_is_left(finished):
    _, directory, _ = finished
    for stage in ("01-red", "02-green", "03-blue"):
        folder = directory / "stages" / stage
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert trained_weights(model) == read_json(folder / "stage.json")["weights"]
        assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "</s>"
        names = {p.name for p in folder.iterdir()}
        assert names == {"model", "method", "responses", "evaluation.json", "statistics.safetensors", "stage.json"}
    assert not [p for p in directory.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".partial")]


def test_the_same_command_again_trains_nothing_and_changes_nothing(finished):
    matrix, directory, config = finished
    files = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name in ("stage.json", "run.json")}
    weights = directory / "stages" / "03-blue" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(config, QUIET) == matrix
    assert weights.stat().st_mtime_ns == before
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_lora_chains_and_the_adapter_loads_with_plain_peft(tmp_path):
    config = tiny_config(tmp_path, tuner={"name": "lora", "r": 4})
    config["stream"]["order"] = ["red", "green"]
    run(config, QUIET)
    stages = tmp_path / "run" / "stages"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    first, second = (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model"), stages / name / "adapter", is_trainable=True
        )
        for name in ("01-red", "02-green")
    )
    assert trained_weights(first) == read_json(stages / "01-red" / "stage.json")["weights"]
    assert trained_weights(second) == read_json(stages / "02-green" / "stage.json")["weights"]
    assert trained_weights(first) != trained_weights(second)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert (first.eval()(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_a_stage_does_not_start_from_other_weights(tmp_path):
    """The adapter of the last stage is swapped for another: the run notices and stops."""
    config = tiny_config(tmp_path, tuner={"name": "lora", "r": 4})
    config["stream"]["order"] = ["red", "green"]
    run(config, QUIET)
    stages = tmp_path / "run" / "stages"
    (stages / "02-green" / "stage.json").unlink()
    (stages / "02-green" / "evaluation.json").unlink()
    weights = "adapter/adapter_model.safetensors"
    (stages / "01-red" / weights).write_bytes((stages / "02-green" / weights).read_bytes())
    with pytest.raises(RunDirectoryError, match=r"adapter_model\.safetensors: is damaged"):
        run(config, QUIET)
    (tmp_path / "run" / "manifest.jsonl").unlink()
    with pytest.raises(RuntimeError, match="would not start from the weights that stage 1 ended with"):
        run(config, QUIET)


def test_joint_is_one_stage_over_all_tasks_and_an_upper_bound(tmp_path):
    matrix = run(tiny_config(tmp_path, method="joint"), QUIET)
    assert matrix["scores"][1] == matrix["scores"][2] == [None] * 3
    assert matrix["joint"] == matrix["scores"][3] and None not in matrix["joint"]
    assert matrix["summary"]["average"] == pytest.approx(sum(matrix["joint"]) / 3)
    assert matrix["summary"]["forgetting"] is None and matrix["summary"]["new_task"] is None
    assert len(read_jsonl(tmp_path / "run" / "events.jsonl")) == 3 * 18
    assert (tmp_path / "run" / "report.html").exists()


def test_frozen_trains_nothing(tmp_path):
    matrix = run(tiny_config(tmp_path, method="frozen"), QUIET)
    assert matrix["scores"] == [matrix["scores"][0]] * 4
    assert matrix["summary"]["forgetting"] == 0
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_the_seed_decides(tmp_path):
    config = tiny_config(tmp_path)
    config["stream"]["order"] = ["red"]
    losses = []
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(config | {"output": str(tmp_path / output), "seed": seed}, QUIET)
        losses.append([e["loss"] for e in read_jsonl(tmp_path / output / "events.jsonl")])
    assert losses[0] == losses[1] != losses[2]


def test_packing_and_a_task_of_text(tmp_path):
    config = tiny_config(tmp_path, method="replay")
    folder = tmp_path / "tasks" / "story"
    folder.mkdir()
    for split, count in (("train", 12), ("test", 3)):
        rows = [{"text": f"once there was a {word}"} for word in ("fox", "cat", "owl") * (count // 3)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["stream"]["order"] = ["story", "red"]
    config["data"] = {"packing": True, "max_length": 64}
    config["training"]["batch_size"] = 2
    matrix = run(config, QUIET)
    assert matrix["metrics"] == {"story": "loss", "red": "accuracy"}
    assert matrix["scores"][1][0] < matrix["scores"][0][0], "a loss falls when the task is learned"
    assert matrix["summary"]["average"] is None, "accuracies and losses have no mean"


def test_accumulation_gives_the_same_trajectory(tmp_path):
    config = tiny_config(tmp_path, method=["replay", "a_gem"])
    config["stream"]["order"] = ["red", "green"]
    losses = []
    for micro in (8, 2):
        # at a gentle rate, since training amplifies what the order of a sum rounds differently
        config["training"] |= {"micro_batch_size": micro, "learning_rate": 3e-3}
        run(config | {"output": str(tmp_path / f"micro{micro}")}, QUIET)
        losses.append([e["loss"] for e in read_jsonl(tmp_path / f"micro{micro}" / "events.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_config_may_change_where_no_number_depends_on_it(tmp_path):
    config = tiny_config(tmp_path, method="frozen")
    run(config, QUIET)
    config["training"] |= {"save_every": 7, "log_every": 3}
    run(config, QUIET)


def test_a_response_may_hold_any_separator(tmp_path):
    rows = [{"response": "one\u2028two\u0085three\n\x0bfour"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
