"""vLLM answers for a run: a stand-in loads what vLLM is handed, and answers by plain greedy decoding."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from holdfast import run
from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.models.vllm_engine import adapter_rank
from holdfast.runner.evaluate import evaluate
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from support.tiny import tiny_config

QUIET = Progress(quiet=True)
RESPONSES = "stages/*/responses/*.jsonl"


class LoRARequest(NamedTuple):
    """What is used of vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """What is used of vLLM's."""

    loaded: list[str]
    handed: list[LoRARequest]
    asked: int
    ended: int

    def __init__(self, model: str, **options: Any):
        room = {"max_model_len", "kv_cache_memory_bytes", "enforce_eager"}
        lora = {"enable_lora", "max_lora_rank", "max_loras"} if "enable_lora" in options else set()
        assert {*options} == {"dtype", "skip_tokenizer_init"} | room | lora
        assert (options["dtype"], options["skip_tokenizer_init"]) == ("float32", True)
        self.loaded.append(model)
        self._name, self._room, self._rank = model, options["max_model_len"], options.get("max_lora_rank", 0)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shut_down))
        self._models: dict[int, Any] = {0: self._base()}

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._name, dtype="float32").eval()

    def _shut_down(self) -> None:
        type(self).ended += 1

    def _with(self, adapter: LoRARequest | None) -> Any:
        """The model with an adapter; one of a known number is not read again."""
        number = 0 if adapter is None else adapter.lora_int_id
        if adapter is not None and number not in self._models:
            self.handed.append(adapter)
            peft = PeftModel.from_pretrained(self._base(), adapter.lora_path).eval()
            assert peft.active_peft_config.r <= self._rank
            self._models[number] = peft
        return self._models[number]

    def generate(
        self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool, lora_request: LoRARequest | None = None
    ) -> list[Any]:
        assert params.temperature == 0 and params.ignore_eos and not use_tqdm
        type(self).asked += len(prompts)
        outputs, model = [], self._with(lora_request)
        for prompt in prompts:
            ids, new = prompt["prompt_token_ids"], list[int]()
            while len(new) < params.max_tokens and not {*new} & {*params.stop_token_ids}:
                with torch.no_grad():
                    new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            assert len(ids) + len(new) <= self._room
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=new)]))
        return outputs


@pytest.fixture
def vllm(monkeypatch) -> type[LLM]:
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    LLM.loaded, LLM.handed, LLM.asked, LLM.ended = [], [], 0, 0
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    modules["vllm.lora.request"].LoRARequest = LoRARequest  # type: ignore[attr-defined]
    return LLM


def configuration(folder: Path, output: str, engine: str, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder)
    config["stream"]["order"] = ["red", "green"]
    config["training"]["epochs"] = 3
    config["evaluation"] |= {"engine": engine, "bootstrap": 0, "rows": 5}
    return config | {"output": str(folder / output)} | changes


DORA = {"name": "lora", "use_dora": True}


@pytest.mark.parametrize(
    "tuner", [pytest.param("full", marks=pytest.mark.slow), "lora", pytest.param(DORA, marks=pytest.mark.slow)], ids=str
)
def test_its_answers_are_those_of_transformers(tuner, vllm, tmp_path):
    ours = run(configuration(tmp_path, "ours", "transformers", tuner=tuner), QUIET)
    assert not vllm.loaded
    theirs = run(configuration(tmp_path, "theirs", "vllm", tuner=tuner), QUIET)
    assert theirs == ours
    start, *stages = vllm.loaded
    folders = sorted((tmp_path / "theirs" / "stages").glob("*/adapter"))
    assert start == str(tmp_path / "model") and vllm.ended == len(vllm.loaded)
    if tuner == "lora":
        assert not stages and [Path(one.lora_path) for one in vllm.handed] == folders
    else:
        assert len(stages) == 2 and not vllm.handed
    assert vllm.asked == sum(len(file.read_text().splitlines()) for file in (tmp_path / "theirs").glob(RESPONSES))
    for file in (tmp_path / "ours").glob(RESPONSES):
        assert file.read_bytes() == (tmp_path / "theirs" / file.relative_to(tmp_path / "ours")).read_bytes()
    assert all(Path(name).exists() == (tuner == "full") for name in stages), "merged weights are not kept"
    loaded = len(vllm.loaded)
    again = evaluate(tmp_path / "theirs", progress=QUIET)
    assert len(vllm.loaded) == loaded + 1 and set(again.changed.values()) == {0}


PLAIN = {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (PLAIN, 16),
        (PLAIN | {"r": 17, "use_rslora": True}, 32),
        (PLAIN | {"r": 513}, 0),
        (PLAIN | {"alpha_pattern": {"q_proj": 8}}, 0),
        (PLAIN | {"target_modules": ["q_proj", "lm_head"]}, 0),
        (PLAIN | {"bias": "all"}, 0),
        (PLAIN | {"peft_type": "IA3"}, 0),
    ],
)
def test_two_factors_a_layer_scaled_alike_are_handed_by_name(config, rank, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_rank(tmp_path) == rank


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
