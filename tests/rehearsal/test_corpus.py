"""A corpus that a model writes of itself: what is in it, a kill, what is refused, and training on it."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

import holdfast.rehearsal.corpus
from holdfast.cli import main
from holdfast.engines.whole import model_fingerprint
from holdfast.errors import ConfigError, DataError
from holdfast.methods.rehearsal import Rehearsal
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.models.sampling import sample
from holdfast.rehearsal.corpus import write_corpus
from holdfast.rehearsal.replay import replay
from holdfast.rehearsal.request import Request, SampleOptions
from holdfast.rehearsal.samples import corpus_rows
from holdfast.system.files import read_json, read_jsonl
from support import forked
from support.families import write_family
from support.rehearsed import two_stages
from support.tiny import tiny_model, tiny_tokenizer, write_model

SIZE = {"options": SampleOptions(length=12), "tokens": 500, "batch_size": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json*"))}


def lines(folder: Path) -> list[dict]:
    return [line for path in sorted(folder.glob("shard-*.jsonl")) for line in read_jsonl(path)]


def test_shards_hold_what_the_model_draws_and_the_manifest_says_so(model, tmp_path):
    out = tmp_path / "corpus"
    manifest = replay(model, out, seed=3, **SIZE)
    loaded, found = tiny_model(), lines(out)
    drawn = sample(loaded, [[1]] * 48, max_new_tokens=11, seed=3)
    assert [line["number"] for line in found] == list(range(42))
    for line in found:
        assert line["input_ids"] == [1, *drawn.tokens[line["number"]]]
        assert line["labels"] == [-100, *drawn.tokens[line["number"]]]
        assert line["log_prob"] == pytest.approx(drawn.log_probs[line["number"]], abs=1e-4)
    counts = {"samples": 42, "tokens": 504, "supervised": 462, "duplicates": 0}
    assert {key: manifest[key] for key in counts} == counts
    assert manifest["log_prob"] == pytest.approx(sum(line["log_prob"] for line in found))
    settings = manifest["settings"]
    assert settings["model"] == {"name": model, "fingerprint": model_fingerprint(loaded)}
    assert settings["tokenizer"] == tokenizer_fingerprint(tiny_tokenizer())
    assert settings["request"]["start"] == [1] and settings["request"]["length"] == 12 and settings["seed"] == 3
    assert len(manifest["files"]) == 6 and read_json(out / "manifest.json") == manifest
    rows = corpus_rows(out, tiny_tokenizer(), 128)
    assert rows == [{"input_ids": line["input_ids"], "labels": line["labels"]} for line in found]


def test_a_killed_corpus_goes_on_and_ends_with_the_same_bytes(model, tmp_path):
    """Killed by SIGKILL before the third shard is in place, with half of it under a temporary name."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    replay(model, unbroken, **SIZE)
    script = f"""
import os, signal, holdfast.rehearsal.corpus as corpus
from holdfast.rehearsal.replay import replay
from holdfast.rehearsal.request import SampleOptions
write = corpus.write_jsonl
def dying(path, rows):
    if path.name == "shard-00002.jsonl":
        path.with_name(path.name + ".partial").write_text("half a sh")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, rows)
corpus.write_jsonl = dying
replay({model!r}, {str(killed)!r}, **{SIZE!r})
"""
    assert forked.run("-c", script).returncode == -signal.SIGKILL
    assert not (killed / "manifest.json").exists() and len(list(killed.glob("shard-*.jsonl"))) == 2
    with pytest.raises(DataError, match="unfinished; the command that began it continues it"):
        corpus_rows(killed)
    with pytest.raises(ConfigError, match="an unfinished corpus of other arguments \\(seed 0, not 1\\)"):
        replay(model, killed, seed=1, **SIZE)
    drawn = []
    replay(model, killed, on_progress=lambda done, total: drawn.append((done, total)), **SIZE)
    assert files(killed) == files(unbroken) and (500, 500) in drawn
    assert not list(killed.glob("settings*"))


def test_how_far_a_corpus_is_is_told_within_a_shard(model, tmp_path):
    told = []
    replay(model, tmp_path / "corpus", on_progress=lambda done, total: told.append((done, total)), **SIZE)
    done = [one for one, total in told if total == SIZE["tokens"]]
    assert done[0] == 0 and done[-1] == SIZE["tokens"] and len(done) == len(told)
    assert len({*done}) > 3 * len(list((tmp_path / "corpus").glob("shard-*.jsonl")))
    assert max(done[: done.index(SIZE["tokens"])]) < SIZE["tokens"]


def test_a_finished_corpus_is_kept_and_never_overwritten(model, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    manifest = replay(model, out, **SIZE)
    with pytest.raises(ConfigError, match="a corpus of other arguments \\(tokens 500, not 600\\)"):
        replay(model, out, **SIZE | {"tokens": 600})
    monkeypatch.setattr(Request, "write", None)
    assert replay(model, out, **SIZE) == manifest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        replay(model, tmp_path / "mine", **SIZE)


def test_duplicates_are_left_out_in_order_and_counted(tmp_path, monkeypatch):
    """Of few possible samples each is kept once, where it was drawn first; a killed corpus counts the same."""
    request, tokenizer, model = Request((5,), 2), tiny_tokenizer(), tiny_model()

    def corpus(name):
        return write_corpus(partial(sample, model), request, tmp_path / name, tokenizer, tokens=70, batch_size=16)

    manifest = corpus("whole")
    found = lines(tmp_path / "whole")
    drawn = [token for [token] in sample(model, [[5]] * 160, max_new_tokens=1, seed=0).tokens]
    first = list(dict.fromkeys(drawn))[:35]
    assert [line["input_ids"] for line in found] == [[5, token] for token in first]
    assert [line["number"] for line in found] == [drawn.index(token) for token in first]
    assert manifest["duplicates"] == found[-1]["number"] + 1 - 35 > 5

    write = holdfast.rehearsal.corpus.write_jsonl
    stopping = [2]

    def stop(path, rows):
        write(path, rows)
        stopping[0] -= 1
        if not stopping[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(holdfast.rehearsal.corpus, "write_jsonl", stop)
    with pytest.raises(KeyboardInterrupt):
        corpus("broken")
    assert corpus("broken") == manifest and files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_model_that_repeats_itself_is_told_so(tmp_path):
    with pytest.raises(DataError, match=r"only 6\d are different ones"):
        write_corpus(
            partial(sample, tiny_model()), Request((5,), 2), tmp_path, tiny_tokenizer(), tokens=1000, batch_size=900
        )


def test_an_adapter_writes_as_its_model_does(model, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = model
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    replay(str(tmp_path / "adapter"), tmp_path / "corpus", **SIZE)
    drawn = sample(adapted, [[1]] * 42, max_new_tokens=11, seed=0)
    assert [line["input_ids"][1:] for line in lines(tmp_path / "corpus")] == drawn.tokens


def damage(out: Path, how: str) -> None:
    shard = out / "shard-00001.jsonl"
    if how == "missing":
        shard.unlink()
    elif how == "changed":
        shard.write_text(shard.read_text().replace("1", "2", 1))
    elif how == "manifest":
        (out / "manifest.json").write_text("{}")
    else:
        (out / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "shard-00001.jsonl: is missing"),
        ("changed", "shard-00001.jsonl: is damaged"),
        ("manifest", "is no manifest of a corpus"),
        ("none", "is no corpus that a model wrote"),
    ],
)
def test_a_damaged_corpus_is_refused(how, reason, model, tmp_path):
    replay(model, tmp_path / "corpus", **SIZE)
    damage(tmp_path / "corpus", how)
    with pytest.raises(DataError, match=reason):
        corpus_rows(tmp_path / "corpus", tiny_tokenizer())


def test_a_corpus_of_another_tokenizer_is_refused(model, tmp_path):
    replay(model, tmp_path / "corpus", **SIZE)
    other = tiny_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(DataError, match="written with another tokenizer than the model's"):
        corpus_rows(tmp_path / "corpus", other)


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_training_reads_the_folder(loss, model, tmp_path):
    replay(model, tmp_path / "corpus", **SIZE)
    trainer = two_stages(tmp_path / "run", Rehearsal(source="self", loss=loss, path=str(tmp_path / "corpus")))
    terms = [log["term/rehearsal"] for log in trainer.state.log_history if "loss" in log]
    assert terms[-1] > 1e-6


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["holdfast", "replay", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_command(model, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "corpus")
    options = ("--tokens", "100", "--out", out, "--length", "10", "--batch-size", "4", "--prompt-token", "9")
    code, said, _ = command(monkeypatch, capsys, model, *options, "--temperature", "0.5", "--seed", "7")
    assert code == 0 and "10 samples, 100 tokens, 0 duplicates left out" in said
    request = Request((9,), 10, temperature=0.5)
    own = request.write(partial(sample, tiny_model()), 7, range(4))
    assert [line["input_ids"] for line in lines(tmp_path / "corpus")][:4] == [o.row["input_ids"] for o in own]


def test_the_command_lets_a_chat_model_speak_for_both(tmp_path, monkeypatch, capsys):
    chat = str(write_family(tmp_path / "chat", "qwen2"))
    options = ("--tokens", "300", "--length", "60")
    code, _, _ = command(monkeypatch, capsys, chat, *options, "--out", str(tmp_path / "both"))
    settings = read_json(tmp_path / "both" / "manifest.json")["settings"]
    assert code == 0 and settings["request"]["turn"] and settings["request"]["stops"]
    code, _, _ = command(monkeypatch, capsys, chat, *options, "--no-chat", "--out", str(tmp_path / "plain"))
    assert code == 0 and {line["input_ids"][0] for line in lines(tmp_path / "plain")} == {1}


WRONG = {
    "neither": ([], "give --tokens and --out, or --inspect"),
    "no such engine": (["--engine", "vlm"], "there is no engine 'vlm'; did you mean 'vllm'?"),
    "no such domain": (["--domain", "eng"], "the tokenizer has no token <|eng|>"),
    "no such token": (["--prompt-token", "64"], "64 is none of the tokenizer's 51 tokens"),
    "cold": (["--temperature", "0"], "temperature: 0.0 cannot divide logits"),
    "beyond": (["--length", "500"], "500 is more than the model's context of 128"),
    "no template": (["--chat"], "no chat template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_refused_before_anything_is_written(case, model, tmp_path, monkeypatch, capsys):
    options, reason = WRONG[case]
    out = [] if case == "neither" else ["--tokens", "100", "--out", str(tmp_path / "out")]
    code, _, said = command(monkeypatch, capsys, model, *out, *options)
    assert code == 2 and reason in said and not (tmp_path / "out").exists()


def test_without_vllm_its_engine_is_refused_with_the_reason(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vllm cannot be used here .*; install it"):
        replay(model, tmp_path / "out", engine="vllm", **SIZE)


def test_the_vllm_engine_asks_for_the_same_and_writes_the_same_corpus(tmp_path, monkeypatch):
    """A stand-in for vLLM draws with holdfast's sampler, and records the requests."""
    model, asked = str(write_model(tmp_path / "model")), []

    class LLM:
        def __init__(self, **options):
            assert options == {"model": model, "max_model_len": 12}

        def generate(self, prompts, params, use_tqdm):
            asked.extend(params)
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            drawn = sample(
                tiny_model(),
                ids,
                max_new_tokens=[p.max_tokens for p in params],
                seed=0,
                numbers=[len(asked) - len(ids) + i for i in range(len(ids))],
            )
            outputs = zip(drawn.tokens, drawn.log_probs, strict=True)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t, cumulative_logprob=p)]) for t, p in outputs]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    manifest = replay(model, tmp_path / "vllm", engine="vllm", **SIZE)
    replay(model, tmp_path / "ours", **SIZE)
    assert lines(tmp_path / "vllm") == lines(tmp_path / "ours")
    assert manifest["settings"]["engine"] == "vllm"
    assert len({one.seed for one in asked}) == len(asked) == 48 and all(0 <= one.seed < 2**63 for one in asked)
    assert {(one.temperature, one.max_tokens, one.ignore_eos, one.logprobs) for one in asked} == {(1.0, 11, True, 0)}
    tiny_model(seed=1).save_pretrained(model)  # another model under the same name
    with pytest.raises(ConfigError, match="holds a corpus of other arguments"):
        replay(model, tmp_path / "vllm", engine="vllm", **SIZE)


HELP = """
import sys
from holdfast.cli import main
sys.argv = ["holdfast", "replay", "--help"]
try:
    main()
except SystemExit:
    print("torch" in sys.modules)
"""


def test_help_imports_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n") and "--prompt-token" in found.stdout
