"""Exports: without holdfast they answer as the run did; the card says what matrix.json says, and what is lacking."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from holdfast import run
from holdfast.api.method import Method
from holdfast.cli import main
from holdfast.deploy.export import MANIFEST, export
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.methods import find, known
from holdfast.metrics.summary import summarize
from holdfast.report.text import code, in_markdown, number
from holdfast.system.files import read_json, read_jsonl, write_json
from holdfast.system.progress import Progress
from holdfast.tuners import known as tuners
from support.tiny import tiny_config, tiny_model, tiny_tokenizer

QUIET = Progress(quiet=True)
TASKS = ["red", "green", "blue"]
PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "holdfast":
            raise ModuleNotFoundError("holdfast is not installed here")

sys.meta_path.insert(0, Blocked())
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

responses = []
for folder, loader, prompts in json.loads(sys.argv[1]):
    loader = {"peft": AutoPeftModelForCausalLM, "transformers": AutoModelForCausalLM}[loader]
    model, tokenizer = loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    responses.append([])
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:]
        responses[-1].append(tokenizer.decode(new, skip_special_tokens=True).strip())
assert "holdfast" not in sys.modules
print(json.dumps(responses))
"""


def taught(folder: Path, **changes) -> Path:
    """A run on a model that gives many different answers."""
    config = tiny_config(folder, model=str(folder / "wide"), **changes)
    if not (folder / "wide").exists():
        tiny_model(initializer_range=0.5).save_pretrained(folder / "wide")
        tiny_tokenizer().save_pretrained(folder / "wide")
    config["training"] |= {"epochs": 2, "learning_rate": 3e-3, "save_every": 100}
    config["evaluation"] |= {"max_new_tokens": 6}
    run(config, QUIET)
    return Path(config["output"])


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return taught(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A run that learns something, so that its figures differ."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "general.txt").write_text("red and green\nblue is not red\n")
    config = tiny_config(folder, method=["replay", {"name": "ewc", "samples": 4}])
    config["evaluation"]["general"] = [{"name": "colours", "path": str(folder / "general.txt")}]
    run(config, QUIET)
    return folder / "run"


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return taught(tmp_path_factory.mktemp("lora"), tuner={"name": "lora", "r": 4})


def answers_in_run(directory: Path, stage: str) -> dict[str, str]:
    rows = [r for task in TASKS for r in read_jsonl(directory / "stages" / stage / "responses" / f"{task}.jsonl")]
    return {row["prompt"]: row["response"] for row in rows}


HEAD = {"name": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}  # which the model ties
EXPORTS = {
    "the whole model": ("full", None, False, "transformers"),
    "the whole model of an earlier stage": ("full", 1, False, "transformers"),
    "an adapter, by PEFT": ("lora", None, False, "peft"),
    "an adapter, by transformers": ("lora", None, False, "transformers"),
    "an adapter of an earlier stage": ("lora", 2, False, "peft"),
    "a merged adapter": ("lora", None, True, "transformers"),
    "a merged adapter of an earlier stage": ("lora", 1, True, "transformers"),
    "a merged head": (HEAD, None, True, "transformers"),
    "adalora, merged": ("adalora", None, True, "transformers"),
    "ia3, merged": ("ia3", None, True, "transformers"),
    "osf, merged": ("osf", None, True, "transformers"),
    "osf": ("osf", None, False, "peft"),
    "a soft prompt": ("prompt", None, False, "peft"),
}
"""By what they are: tuner, stage, whether it is merged, and what loads it."""


@pytest.fixture(scope="module")
def answered(full, lora, tmp_path_factory) -> dict[str, tuple[dict[str, str], list[str]]]:
    """For each of EXPORTS the run's responses by prompt, and those of a process that cannot import holdfast."""
    folder = tmp_path_factory.mktemp("exports")
    runs, jobs, expected = {"full": full, "lora": lora}, [], []
    for place, (tuner, stage, merge, loader) in enumerate(EXPORTS.values()):
        key = str(tuner)
        if key not in runs:
            runs[key] = taught(lora.parent, tuner=tuner, output=str(folder / f"run{len(runs)}"))
        export(runs[key], folder / str(place), stage=stage, merge=merge)
        expected.append(answers_in_run(runs[key], f"0{stage or 3}-{TASKS[(stage or 3) - 1]}"))
        jobs.append((str(folder / str(place)), loader, list(expected[-1])))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(jobs)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(EXPORTS, zip(expected, json.loads(done.stdout.splitlines()[-1]), strict=True), strict=True))


def table(card: str, heading: str) -> list[list[str]]:
    """The rows below the head of a section's first table."""
    lines = [
        line for line in card.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"
    ]
    return [[cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("what", EXPORTS)
def test_it_answers_as_the_run_did_where_holdfast_is_not_installed(what, answered):
    expected, found = answered[what]
    assert len(set(expected.values())) > 5, "answers that are all the same show little"
    assert found == list(expected.values())


def test_stages_differ(full):
    assert answers_in_run(full, "01-red") != answers_in_run(full, "03-blue")


def test_a_merged_model_is_whole_and_its_logits_are_those_of_the_adapter(lora, tmp_path):
    export(lora, tmp_path / "merged", merge=True)
    export(lora, tmp_path / "adapter")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(lora.parent / "wide")
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-3) and not torch.allclose(merged, before, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_model_has_the_data_type_of_its_base(dtype, lora, tmp_path):
    """It is merged in float32 and rounded once, whatever type the run trained in."""
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tiny_config(lora.parent, model=str(tmp_path / "model"), output=str(tmp_path / "run"), tuner="lora")
    run(config | {"training": {"max_steps": 2, "learning_rate": 0.1}}, QUIET)
    exported = export(tmp_path / "run", tmp_path / "merged", merge=True)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "merged"))
    assert {name: t.dtype for name, t in merged.items()} == dict.fromkeys(base, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, exported.run.path / "stages" / "03-blue" / "adapter").merge_and_unload()
    assert all(torch.equal(merged[name], t.to(dtype)) for name, t in expected.state_dict().items() if name in merged)
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert f"the weights are {str(dtype).removeprefix('torch.')}" in (tmp_path / "merged" / "README.md").read_text()


def test_a_relative_base_model_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, tuner="lora", model="./model")
    run(config | {"training": {"max_steps": 1}}, QUIET)
    exported = export("run", "out")
    adapter = read_json(tmp_path / "out" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == str(tmp_path / "model") and adapter["revision"] is None
    assert any(str(tmp_path / "model") in line and "--merge" in line for line in exported.lacks)


def test_a_relative_base_model_is_found_from_the_run_and_then_from_here(tmp_path, monkeypatch):
    project, away = tmp_path / "project", tmp_path / "away"
    away.mkdir()
    project.mkdir()
    monkeypatch.chdir(project)
    run(tiny_config(project, tuner="lora", model="model") | {"training": {"max_steps": 1}, "output": "runs/a"}, QUIET)
    shutil.copytree(project / "model", away / "model")  # of the same name, and not the run's
    monkeypatch.chdir(away)

    def base(directory: Path) -> str:
        for merge in (True, False):
            export(directory, tmp_path / "out", merge=merge)
        return read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"]

    assert base(project / "runs" / "a") == str(project / "model")
    moved = project.rename(tmp_path / "moved")
    assert base(moved / "runs" / "a") == str(moved / "model")
    lone = (moved / "runs" / "a").rename(tmp_path / "lone")
    assert base(lone) == str(away / "model")
    shutil.rmtree(away / "model")
    with pytest.raises(ConfigError, match=r"model\.name: .*'model'.* neither at .* nor at ") as said:
        base(lone)
    assert str(lone.resolve() / ".." / ".." / "model") not in str(said.value) and str(away / "model") in str(said.value)
    assert (tmp_path / "out" / "README.md").exists()


def test_a_whole_model_needs_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_config(tmp_path, tuner="full", model="model") | {"training": {"max_steps": 1}}, QUIET)
    shutil.rmtree(tmp_path / "model")
    assert export(Path("run"), Path("out")).local_base
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text()


def test_it_stops_where_the_runs_responses_end_and_keeps_the_models_other_settings(lora, tmp_path):
    """The chat template ends answers with a token that the model's own settings do not know."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["+"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}={{ m.content }}+{% endfor %}{% if add_generation_prompt %}a={% endif %}"
    )
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(lora.parent, model=str(tmp_path / "model"), output=str(tmp_path / "run"))
    for tuner in ("full", "lora"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run(config | {"tuner": tuner, "training": {"max_steps": 1}}, QUIET)
        exported = export(tmp_path / "run", tmp_path / tuner)
        settings = GenerationConfig.from_pretrained(tmp_path / tuner)
        assert settings.eos_token_id == [2, tokenizer.convert_tokens_to_ids("+")] and settings.pad_token_id == 0
        assert settings.repetition_penalty == 1.5 and not settings._from_model_config
        assert exported.chat and AutoTokenizer.from_pretrained(tmp_path / tuner).chat_template
        assert "chat template, which this folder holds" in (tmp_path / tuner / "README.md").read_text()
    shutil.rmtree(tmp_path / "run")
    run(config | {"data": {"template": "plain"}, "training": {"max_steps": 1}}, QUIET)
    assert any("without it" in line for line in export(tmp_path / "run", tmp_path / "plain").lacks)


def test_the_card_says_what_matrix_json_says(scored, tmp_path):
    export(scored, tmp_path / "out")
    card, matrix = ModelCard.load(tmp_path / "out" / "README.md"), read_json(scored / "matrix.json")
    figures = {row[0].replace(" ", "_"): row[1] for row in table(card.text, "Scores")}
    assert figures == {
        key: number(value, signed=key in ("learned", "backward_transfer", "forward_transfer", "general_change"))
        for key, value in matrix["summary"].items()
    }
    assert [row[1:] for row in table(card.text, "Score matrix")] == [
        [number(score) for score in row] for row in matrix["scores"]
    ]
    before, *_, after = matrix["general"]["perplexity/colours"]
    assert table(card.text, "General abilities")[0][:3] == ["perplexity/colours", number(before), number(after)]
    info = read_json(scored / "run.json")
    rows = [[t, str(i), "24", "8", "accuracy"] for i, t in enumerate(TASKS, start=1)]
    assert table(card.text.replace("\n| task |", "\n\n## Tasks\n\n| task |"), "Tasks") == rows
    for text in ("`replay`", "`ewc` (samples 4)", "`full`", f"transformers {info['versions']['transformers']}"):
        assert text in card.text
    assert card.data.library_name == "transformers" and card.data.base_model is None  # a folder is no hub name
    assert {"holdfast", "replay", "ewc", "full"} <= set(card.data.tags)


def test_an_earlier_stages_card_is_about_that_stage(scored, tmp_path):
    export(scored, tmp_path / "out", stage=2)
    card, matrix = ModelCard.load(tmp_path / "out" / "README.md"), read_json(scored / "matrix.json")
    figures = {row[0]: row[1] for row in table(card.text, "Scores")}
    so_far = summarize([row[:2] for row in matrix["scores"][:3]])
    for key in ("average", "forgetting"):
        assert figures[key] == number(so_far[key]) != number(matrix["summary"][key])
    assert f"| **after green** | **{number(matrix['scores'][2][0])}** |" in card.text
    assert table(card.text, "General abilities")[0][2] == number(matrix["general"]["perplexity/colours"][2])
    assert "| blue | not learned here |" in card.text and "taught red, green\n" in card.text


def test_a_hub_model_and_hub_data_stand_in_the_cards_metadata(lora, tmp_path, monkeypatch):
    copy = shutil.copytree(lora, tmp_path / "run")
    info = read_json(copy / "run.json")
    info["config"]["model"] |= {"name": "some/model", "revision": "v2"}
    info["model_folder"] = None
    info["config"]["stream"] = {"tasks": [{"name": n, "dataset": f"some/{n}"} for n in TASKS]}
    write_json(copy / "run.json", info)
    (copy / "manifest.jsonl").unlink()
    monkeypatch.setattr("holdfast.models.pretrained.load_model_config", lambda model: tiny_model().config)
    monkeypatch.setattr(GenerationConfig, "from_pretrained", _absent)
    exported = export(copy, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "some/model" and data.datasets == [f"some/{n}" for n in TASKS]
    assert data.library_name == "peft" and data.base_model_relation == "adapter"
    adapter = read_json(tmp_path / "out" / "adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("some/model", "v2")
    assert any("'v2'" in line for line in exported.lacks)


def _absent(*args, **kwargs):
    raise OSError


def test_joint_training_is_measured_in_the_last_row(tmp_path):
    run(tiny_config(tmp_path, method="joint"), QUIET)
    directory = tmp_path / "run"
    export(directory, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    matrix = read_json(directory / "matrix.json")
    assert f"| **after all tasks** | **{number(matrix['scores'][3][0])}** |" in card and "all at once" in card
    assert f"| average | {number(matrix['summary']['average'])} |" in card


@pytest.mark.parametrize(
    ("changes", "acts"),
    [
        ({"method": "hide_lora"}, True),
        ({"method": {"name": "cia", "grouping": 0.5}}, True),
        ({"method": "cia"}, False),
        ({"method": "mbpa"}, True),
        ({"method": {"name": "mbpa", "steps": 0}}, False),
    ],
)
def test_what_a_method_does_at_test_time_is_said_to_be_missing(changes, acts, lora, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(lora, tmp_path / "run")
    info = read_json(copy / "run.json")
    method = changes["method"]
    info["config"]["method"] = [{"name": method} if isinstance(method, str) else method]
    write_json(copy / "run.json", info)
    (copy / "manifest.jsonl").unlink()
    command(monkeypatch, copy, "--to", tmp_path / "out", "--merge")
    name = info["config"]["method"][0]["name"]
    options = {"grouping": 0.5} if name == "cia" else {}  # with which it acts at test time
    lacks = find(name)(**options).lacks
    assert lacks and (f"warning: method '{name}' {lacks}" in capsys.readouterr().err) == acts
    assert ("## What this folder lacks" in (tmp_path / "out" / "README.md").read_text()) == acts
    assert bool(read_json(tmp_path / "out" / MANIFEST)["lacks"]) == acts


def test_every_method_that_acts_at_test_time_says_what_a_folder_lacks():
    class Acting(Method, registered=False):
        name = "acting"

        def at_test(self, evaluation, rows):
            yield range(len(rows))

    assert "a plain library does not" in Acting().lacks and not find("replay")().lacks
    for name, cls in known().items():
        if cls.__module__.startswith("holdfast.methods."):
            acts = cls.at_test is not Method.at_test or cls.ask is not Method.ask
            assert ("lacks" in vars(cls)) == acts, name


@pytest.mark.parametrize("tuner", ["moe_lora", "prompt"])
def test_an_adapter_that_cannot_be_merged_is_refused_and_exported_with_its_limits(tuner, tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, tuner=tuner)
    run(config | {"training": {"max_steps": 1}}, QUIET)
    assert refused(monkeypatch, capsys, tmp_path / "run", "--to", tmp_path / "out", "--merge").startswith(
        f"holdfast: --merge: tuner '{tuner}' cannot be merged into the model, since {tuners()[tuner].not_merged}"
    )
    assert not (tmp_path / "out").exists()
    assert tuners()[tuner].lacks in export(tmp_path / "run", tmp_path / "out").lacks


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["holdfast", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one message of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["holdfast", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and len(printed.err.strip().splitlines()) == 1
    return printed.err


def test_what_is_not_there_is_said_in_one_message(full, tmp_path, monkeypatch, capsys):
    out = ("--to", tmp_path / "out")
    for stage, why in ((0, "is before training, the base model itself"), (4, "is no complete stage of this run")):
        assert f"--stage: {stage} {why}; complete: 1, 2, 3" in refused(
            monkeypatch, capsys, full, *out, "--stage", stage
        )
    assert "is not a run's directory" in refused(monkeypatch, capsys, tmp_path / "nothing", *out)
    begun = shutil.copytree(full, tmp_path / "begun")
    (begun / "stages" / "03-blue" / "stage.json").unlink()
    assert "--stage: 3" in refused(monkeypatch, capsys, begun, *out, "--stage", 3)
    for stage in ("01-red", "02-green"):
        (begun / "stages" / stage / "stage.json").unlink()
    assert "no stage of this run is complete yet" in refused(monkeypatch, capsys, begun, *out)
    info = read_json(begun / "run.json")
    info["config"]["method"] = [{"name": "frozen"}]
    write_json(begun / "run.json", info)
    (begun / "manifest.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match="'frozen' trains nothing"):
        export(begun, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_of_a_run_that_goes_on_can_be_exported(full, tmp_path):
    begun = shutil.copytree(full, tmp_path / "begun")
    (begun / "stages" / "03-blue" / "stage.json").unlink()
    assert export(begun, tmp_path / "out").stage == 2


def test_only_an_earlier_export_is_replaced(full, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    assert export(full, mine, stage=1).stage == 1  # an empty folder is filled
    (mine / "stale").touch()
    export(full, mine, stage=2)
    assert read_json(mine / MANIFEST)["stage"] == 2 and not (mine / "stale").exists()
    (mine / MANIFEST).unlink()
    before = sorted(mine.iterdir())
    assert "holds other files" in refused(monkeypatch, capsys, full, "--to", mine)
    assert sorted(mine.iterdir()) == before
    (tmp_path / "file").touch()
    assert "is a file" in refused(monkeypatch, capsys, full, "--to", tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


class Hub:
    """A stand-in for huggingface_hub.HfApi that takes note of what it is told."""

    files: tuple[str, ...] = (".gitattributes",)
    told: list[tuple[str, dict]]

    def create_repo(self, repo_id, **options):
        if repo_id == "no/token":
            raise OSError("401: who are you?")
        self.told.append(("create", {"repo_id": repo_id} | options))

    def list_repo_files(self, repo_id):
        return list(self.files)

    def upload_folder(self, **options):
        assert (Path(options["folder_path"]) / "README.md").exists()
        self.told.append(("upload", options))


@pytest.fixture
def hub(monkeypatch):
    told: list = []
    monkeypatch.setattr(Hub, "told", told, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return told


def test_it_is_pushed_only_where_that_is_asked_for(hub, full, lora, tmp_path, monkeypatch, capsys):
    export(full, tmp_path / "out")
    assert hub == []
    export(full, tmp_path / "out", push_to="me/model")
    (first, repo), (second, sent) = hub
    assert (first, second) == ("create", "upload") and repo == {"repo_id": "me/model", "exist_ok": True}
    assert sent["repo_id"] == "me/model" and sent["folder_path"] == tmp_path / "out"
    hub.clear()
    pushed = (full, "--to", tmp_path / "out", "--push-to")
    assert "401: who are you?" in refused(monkeypatch, capsys, *pushed, "no/token")
    monkeypatch.setattr(Hub, "files", ("README.md", "model.safetensors"))
    assert "me/other holds other files" in refused(monkeypatch, capsys, *pushed, "me/other")
    assert [what for what, _ in hub] == ["create"]
    monkeypatch.setattr(Hub, "files", ("README.md", MANIFEST, "adapter_config.json"))
    export(full, tmp_path / "out", push_to="me/model")
    assert hub[-1][1]["delete_patterns"] == "*"  # a stray adapter_config.json would be loaded with the model


def test_an_adapter_whose_base_nobody_else_has_is_not_pushed(hub, lora, tmp_path, monkeypatch, capsys):
    message = refused(monkeypatch, capsys, lora, "--to", tmp_path / "out", "--push-to", "me/adapter")
    assert "--push-to: the adapter's base model is a folder of this machine" in message and hub == []
    assert not (tmp_path / "out").exists()
    export(lora, tmp_path / "out", merge=True, push_to="me/model")
    assert [what for what, _ in hub] == ["create", "upload"]


def test_names_from_a_record_begin_no_markup_in_a_card():
    """A run's directory may be somebody else's: its names neither command a terminal nor make HTML or code."""
    hostile = "a\x1b[31m`</b><script>|\n---\n[x](y) *b*"
    shown = in_markdown(hostile)
    assert "\x1b" not in shown and "\n" not in shown and "<" not in shown
    assert all(shown[i - 1] in "\\␛" for i, sign in enumerate(shown) if sign in "`|[*")
    assert code(hostile).count("`") == 2 and "\n" not in code(hostile)
    assert in_markdown("tickets_2026-01, after (stage 1)") == "tickets_2026-01, after (stage 1)"


def test_a_link_in_a_stage_is_not_exported(scored, tmp_path):
    """It may lead to a file of the user's, which an export would copy, and a push would publish."""
    shutil.copytree(scored, tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    [folder] = (tmp_path / "run").glob("stages/03-*/model")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RunDirectoryError, match=r"notes.txt: is a link to another file"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
