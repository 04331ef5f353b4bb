"""vLLM answers for a run: a stand-in loads what vLLM is handed, and answers by plain greedy decoding."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from holdfast import run
from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.runner.evaluate import evaluate
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from support.tiny import tiny_config

QUIET = Progress(quiet=True)
RESPONSES = "stages/*/responses/*.jsonl"


class LLM:
    """What is used of vLLM's."""

    loaded: list[str]
    asked: int
    ended: int

    def __init__(self, model: str, *, max_model_len: int, dtype: str, skip_tokenizer_init: bool):
        assert (dtype, skip_tokenizer_init) == ("float32", True)
        self.loaded.append(model)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._room = max_model_len
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shut_down))

    def _shut_down(self) -> None:
        type(self).ended += 1

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        assert params.temperature == 0 and params.ignore_eos and not use_tqdm
        type(self).asked += len(prompts)
        outputs = []
        for prompt in prompts:
            ids, new = prompt["prompt_token_ids"], list[int]()
            while len(new) < params.max_tokens and not {*new} & {*params.stop_token_ids}:
                with torch.no_grad():
                    new.append(int(self._model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            assert len(ids) + len(new) <= self._room
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=new)]))
        return outputs


@pytest.fixture
def vllm(monkeypatch) -> type[LLM]:
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    LLM.loaded, LLM.asked, LLM.ended = [], 0, 0
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return LLM


def configuration(folder: Path, output: str, engine: str, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder)
    config["stream"]["order"] = ["red", "green"]
    config["training"]["epochs"] = 3
    config["evaluation"] |= {"engine": engine, "bootstrap": 0, "rows": 5}
    return config | {"output": str(folder / output)} | changes


@pytest.mark.parametrize("tuner", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_its_answers_are_those_of_transformers(tuner, vllm, tmp_path):
    ours = run(configuration(tmp_path, "ours", "transformers", tuner=tuner), QUIET)
    assert not vllm.loaded
    theirs = run(configuration(tmp_path, "theirs", "vllm", tuner=tuner), QUIET)
    assert theirs == ours
    start, *stages = vllm.loaded
    assert start == str(tmp_path / "model") and len(stages) == 2 and vllm.ended == 3
    assert vllm.asked == sum(len(file.read_text().splitlines()) for file in (tmp_path / "theirs").glob(RESPONSES))
    for file in (tmp_path / "ours").glob(RESPONSES):
        assert file.read_bytes() == (tmp_path / "theirs" / file.relative_to(tmp_path / "ours")).read_bytes()
    assert all(Path(name).exists() == (tuner == "full") for name in stages), "merged weights are not kept"
    again = evaluate(tmp_path / "theirs", progress=QUIET)
    assert len(vllm.loaded) == 4 and set(again.changed.values()) == {0}


REFUSED = {
    "mbpa": ({"method": "mbpa"}, "method 'mbpa' changes the model at test time"),
    "prompt": ({"tuner": "prompt"}, "tuner 'prompt' cannot be merged into the model, since"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_answer_for_is_refused_before_training(case, tmp_path):
    changes, reason = REFUSED[case]
    config = load_config(configuration(tmp_path, "refused", "vllm", **changes))
    with pytest.raises(ConfigError, match=rf"evaluation.engine: vllm cannot answer for this run, since {reason}"):
        prepare(resolve(config))


def test_without_vllm_a_run_does_not_begin(monkeypatch, tmp_path):
    monkeypatch.setattr("holdfast.runner.answering.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vllm is not installed here; pip install vllm"):
        run(configuration(tmp_path, "absent", "vllm"), QUIET)
    assert not (tmp_path / "absent" / "run.json").exists()
