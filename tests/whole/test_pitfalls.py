"""The mistakes of newcomers: each is told, and a twin without the mistake is told nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer

from holdfast import tuners
from holdfast.config.run import load_config
from holdfast.errors import UserError
from holdfast.runner import memory, pitfalls
from holdfast.runner.stage import StageWatch
from holdfast.training import memory_estimate
from holdfast.training.trainer import ContinualTrainer, continual
from support.command import holdfast
from support.paths import DOCS
from support.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from support.trained import trained

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDLESS = CHAT.replace("{{ eos_token }}", "\n")
LETTERS = "abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models, and what is made beside them."""
    folder = tmp_path_factory.mktemp("pitfalls")
    write(folder / "model")
    write(folder / "chat", chat_template=CHAT)
    return folder


def write(folder: Path, model: Any = None, added: str = "", **options: Any) -> Path:
    """A model's folder, whose tokenizer has one more token than the model where one is added."""
    tokenizer = tiny_tokenizer(**options)
    size = len(tokenizer) if added else VOCABULARY
    tokenizer.add_tokens([added] if added else [])
    (model or tiny_model(vocab_size=size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(text: str = "ask {}?", answer: str = "{}", letters: str = LETTERS) -> list[dict[str, Any]]:
    return [{"prompt": text.format(letter), "answer": answer.format(letter)} for letter in letters]


def chats(*roles: str) -> list[dict[str, Any]]:
    said = {"assistant": "{}"}
    return [
        {"messages": [{"role": role, "content": said.get(role, "ask {}").format(a)} for role in roles]} for a in LETTERS
    ]


class Newcomer:
    """Does what a newcomer would, and keeps what is said."""

    def __init__(self, place: Path, tmp_path: Path, capsys: Any, caplog: Any, monkeypatch: Any):
        self.place, self.tmp_path, self.capsys, self.caplog, self.monkeypatch = (
            *(place, tmp_path, capsys, caplog),
            monkeypatch,
        )
        self.said = ""

    @property
    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records if record.levelno >= logging.WARNING]

    def command(self, *words: Any) -> int:
        code = holdfast(*words)
        out = self.capsys.readouterr()
        self.said += " ".join(f"{out.out} {out.err}".split())
        return code

    def config(self, rows: list[Any] | None = None, **changes: Any) -> Path:
        """A run on rows, which are also its test rows but for their prompts; four are tested."""
        folder = self.tmp_path / "tasks" / "letters"
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows or pairs()
        for split, part in (("train", rows[4:]), ("test", rows[:4])):
            (folder / f"{split}.json").write_text(json.dumps(part), encoding="utf-8")
        config = tiny_config(self.place)
        config |= {"stream": {"path": str(folder.parent)}, "output": str(self.tmp_path / "run")}
        config["evaluation"] |= {"general": []}
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(config.get(key), dict) else value
        file = self.tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file

    def check(self, rows: list[Any] | None = None, **changes: Any) -> None:
        self.command("check", self.config(rows, **changes))

    def train(self, rows: Any = None, model: Any = None, args: dict[str, Any] | None = None, **extra: Any) -> Any:
        """A step with the drop-in trainer."""
        try:
            return trained(self.tmp_path, rows=rows, model=model, args={"max_steps": 1} | (args or {}), **extra)
        except (UserError, RuntimeError) as error:
            self.said += " ".join([str(error), *getattr(error, "__notes__", ())])


Case = Callable[[Newcomer, bool], None]
CASES: dict[str, tuple[str, Case]] = {}


def case(name: str, says: str) -> Callable[[Case], Case]:
    """A mistake, and what is said of it; the function does the same with the mistake and without."""

    def added(do: Case) -> Case:
        CASES[name] = says, do
        return do

    return added


# --- data ---


@case("wrong column names", "the keys 'ask', 'reply' are no known shape")
def _(newcomer, mistake):
    newcomer.check([{"ask": row["prompt"], "reply": row["answer"]} for row in pairs()] if mistake else pairs())


@case("the last turn is the user's", "go on after their last answer, and end there now")
def _(newcomer, mistake):
    newcomer.check(chats("user", "assistant", *(["user"] if mistake else [])))


@case("no answer in a chat", "messages: must end with an answer (role assistant)")
def _(newcomer, mistake):
    newcomer.check(chats("user", *([] if mistake else ["assistant"])))


@case("test rows stand in train", "1 of 5 test rows stand in the train split")
def _(newcomer, mistake):
    file = newcomer.config()
    test = newcomer.tmp_path / "tasks" / "letters" / "test.json"
    test.write_text(json.dumps(pairs()[: 5 if mistake else 4]), encoding="utf-8")
    newcomer.command("check", file)


@case("max_length cuts the answers away", "raise data.max_length")
def _(newcomer, mistake):
    newcomer.check(pairs(answer=30 * "{0}"), data={"max_length": 16 if mistake else 64}, evaluation=LONG)


@case("the response is shorter than the answers", "test answers are longer than the 3 tokens of a response")
def _(newcomer, mistake):
    newcomer.check(pairs(answer=30 * "{0}"), evaluation={} if mistake else LONG)


LONG = {"max_new_tokens": 34}


# --- templates and tokens ---


@case("chat template wanted and absent", "the tokenizer has no chat template; plain or auto would do")
def _(newcomer, mistake):
    newcomer.check(data={"template": "chat"}, model=str(newcomer.place / ("model" if mistake else "chat")))


@case("conversations for a base model", "rows have several turns, and the tokenizer of")
def _(newcomer, mistake):
    rows = chats("system", "user", "assistant")
    newcomer.check(rows, model=str(newcomer.place / ("model" if mistake else "chat")))


@case("answers without an end", "no answer has an end that the model could learn")
def _(newcomer, mistake):
    model = write(newcomer.tmp_path / "endless", chat_template=ENDLESS if mistake else CHAT)
    newcomer.check(chats("user", "assistant"), model=str(model), evaluation=LONG)


@case("control tokens spelt in the texts", "is read as letters and not as the control token")
def _(newcomer, mistake):
    newcomer.check(pairs("<s>ask {}?" if mistake else "ask {}?"))


@case("chats that are rendered already", "if a template has rendered these rows already")
def _(newcomer, mistake):
    newcomer.check(pairs("ask {}?</s>" if mistake else "ask {}?"), model=str(newcomer.place / "chat"))


@case("tokens without embeddings", "writes tokens beyond the")
def _(newcomer, mistake):
    model = write(newcomer.tmp_path / "more", added="<new>" if mistake else "")
    newcomer.check(pairs("<new> {}?" if mistake else "ask {}?"), model=str(model))


@case("tokens without embeddings, drop-in", "makes room, or take the tokenizer of the model")
def _(newcomer, mistake):
    newcomer.train([answer(VOCABULARY if mistake else 9)] * 8)


@case("padding token added without embedding", "'[PAD]' (51)")
def _(newcomer, mistake):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"} if mistake else {})
    folder = newcomer.tmp_path / "padded"
    tiny_model(vocab_size=51).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    newcomer.check(model=str(folder))


def answer(*ids: int, end: int = 2) -> dict[str, list[int]]:
    """A row of a prompt, an answer, and its end."""
    return {"input_ids": [5, 6, *ids, end], "labels": [-100, -100, *ids, end]}


@case("labels all masked", "of 8 rows that were looked at is supervised: their labels are all -100")
def _(newcomer, mistake):
    rows = [answer(letter, 9) for letter in range(10, 18)]
    newcomer.train([row | {"labels": [-100] * 5} for row in rows] if mistake else rows)


@case("labels of some rows masked", "no token of 1 of 8 rows that were looked at is supervised")
def _(newcomer, mistake):
    rows = [answer(letter, 9) for letter in range(10, 18)]
    newcomer.train([rows[0] | {"labels": [-100] * 5} if mistake else rows[0], *rows[1:]])


@case("the padding token is the end", "masks it as padding, so that the model never learns to stop")
def _(newcomer, mistake):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>" if mistake else "<pad>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": answer(letter)["input_ids"]} for letter in range(10, 18)]
    with_collator(newcomer, rows, collator, tokenizer)


def with_collator(newcomer: Newcomer, rows: Any, collator: Any, tokenizer: Any, **args: Any) -> None:
    """Train with a collator and a tokenizer of the user's."""

    class Mine(Trainer):
        def __init__(self, **given: Any):
            super().__init__(**given | {"data_collator": collator, "processing_class": tokenizer})

    newcomer.train(rows, cls=continual(Mine), args=args)


@case("no answer ends", "no answer ends with '</s>', at which generation stops, but with tokens such as 'h'")
def _(newcomer, mistake):
    rows = [answer(letter, end=10 if mistake else 2) for letter in range(11, 19)]
    newcomer.train(rows, processing_class=tiny_tokenizer())


@case("two begin tokens", "rows begin with '<s>' twice")
def _(newcomer, mistake):
    rows = [answer(letter) for letter in range(10, 18)]
    rows = [{key: [*([1] if mistake else []), 1, *row[key]] for key in row} for row in rows]
    newcomer.train(rows, processing_class=tiny_tokenizer())


@case("max_length cuts the answers away, drop-in", "of 8 rows that were looked at fill its 4 tokens without an end")
def _(newcomer, mistake):
    class Cutting(Trainer):
        def __init__(self, **given: Any):
            super().__init__(**given)
            self.args.max_length = 4  # as TRL's arguments have it

    rows = [answer(letter, *([9, 9] if mistake else [])) for letter in range(10, 18)]
    rows = [{key: row[key][:4] for key in row} for row in rows]
    newcomer.train(rows, cls=continual(Cutting), processing_class=tiny_tokenizer())


# --- settings ---


@case("a rate for adapters with all weights", "is a rate for adapters, and all 1.1 billion weights")
def _(newcomer, mistake):
    newcomer.monkeypatch.setattr(pitfalls, "shapes", lambda model: nn.Linear(2**15, 2**15, device="meta"))
    newcomer.check(training={"learning_rate": 5e-4 if mistake else 2e-5})


@case("a rate for all weights with adapters", "low-rank adapters alone are trained, which hardly learn with it")
def _(newcomer, mistake):
    newcomer.check(tuner="lora", training={"learning_rate": 2e-5 if mistake else 2e-4})


@case("a rate for all weights with adapters, drop-in", "learning_rate: 1e-05 is a rate for all weights of a model")
def _(newcomer, mistake):
    newcomer.train(model=adapted(tiny_model()), args={"learning_rate": 1e-5 if mistake else 1e-4})


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


@case("all steps are warm-up", "all 18 optimizer steps are warm-up")
def _(newcomer, mistake):
    newcomer.check(training={"warmup": 18 if mistake else 0.1})


@case("the only step is warm-up", "the only optimizer step is warm-up, with a learning rate of 0")
def _(newcomer, mistake):
    newcomer.check(training={"max_steps": 1, "warmup": 0.03 if mistake else 0})


@case("all steps are warm-up, drop-in", "warmup_steps: the only optimizer step is warm-up")
def _(newcomer, mistake):
    newcomer.train(args={"warmup_steps": 1 if mistake else 0})


@case("the batch is larger than the data", "a step of 32 rows takes all 20 that there are")
def _(newcomer, mistake):
    newcomer.check(training={"batch_size": 32 if mistake else 8})


@case("weights in float16", "stored takes the float16 of")
def _(newcomer, mistake):
    model = write(newcomer.tmp_path / "half", tiny_model().half() if mistake else tiny_model().bfloat16())
    newcomer.check(model={"name": str(model), "dtype": "stored"})


@case("weights in float16, drop-in", "the weights that are trained are float16")
def _(newcomer, mistake):
    newcomer.train(model=tiny_model().half() if mistake else tiny_model().bfloat16())


@case("layers that the model lacks", "has no layer 'c_attn'; it has down_proj,")
def _(newcomer, mistake):
    newcomer.check(tuner={"name": "lora", "target_modules": ["c_attn" if mistake else "q_proj"]})


@case("one of the layers is lacking", "has no layer 'c_attn', so that the others alone are adapted")
def _(newcomer, mistake):
    newcomer.check(tuner={"name": "lora", "target_modules": ["q_proj", "c_attn" if mistake else "self_attn.k_proj"]})


@case("weights in 4 bits are trained", "trains or decomposes the model's own weights, which must not be quantised")
def _(newcomer, mistake):
    newcomer.check(model={"name": str(newcomer.place / "model"), "quantization": "4bit" if mistake else None})


# --- models ---


@case("an adapter is taken for a model", "is an adapter beside a whole model; merge it into its base")
def _(newcomer, mistake):
    model = write(newcomer.tmp_path / "both")
    if mistake:
        adapted(tiny_model()).save_pretrained(newcomer.tmp_path / "adapter")
        (newcomer.tmp_path / "adapter" / "adapter_config.json").rename(model / "adapter_config.json")
    newcomer.check(model=str(model))


@case("two adapters, drop-in", "an adapter was put onto a model that has one already")
def _(newcomer, mistake):
    newcomer.train(model=adapted(adapted(tiny_model()) if mistake else tiny_model()), args={"learning_rate": 1e-3})


@case("code that is not trusted", "comes with Python code of its own, which runs only if you trust it")
def _(newcomer, mistake):
    model = write(newcomer.tmp_path / "own")
    if mistake:
        config = json.loads((model / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
        (model / "config.json").write_text(json.dumps(config))
        (model / "mine.py").write_text("raise SystemExit")
    newcomer.check(model=str(model))


@case("a gated model", "is a gated model of the hub: accept its terms on https://huggingface.co/")
def _(newcomer, mistake):
    def gated(*args: Any, **kwargs: Any) -> Any:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    if mistake:
        newcomer.monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    newcomer.check()


@case("a model of the hub without a network", "HF_HUB_OFFLINE is set")
def _(newcomer, mistake):
    newcomer.check(model="some/model" if mistake else str(newcomer.place / "model"))


def finished(newcomer: Newcomer, template: str) -> Path:
    """A run of a model with a chat template, made once."""
    run = newcomer.place / f"run-{template}"
    if not run.exists():
        write(newcomer.place / f"base-{template}", chat_template=CHAT)
        training = {"max_steps": 2, "warmup": 0, "learning_rate": 1e-3}
        options = {"model": str(newcomer.place / f"base-{template}"), "data": {"template": template}}
        newcomer.command("run", newcomer.config(tuner="lora", training=training, output=str(run), **options))
        newcomer.said = ""
    return run


@case("another template at test time", "the run was trained and measured without it (data.template: plain)")
def _(newcomer, mistake):
    newcomer.command("export", finished(newcomer, "plain" if mistake else "chat"), "--to", newcomer.tmp_path / "to")


@case("an adapter on another base", "changed since this run began: model: model.safetensors")
def _(newcomer, mistake):
    run, base = finished(newcomer, "chat"), newcomer.place / "base-chat"
    tiny_model(seed=5 if mistake else 0).save_pretrained(base)
    newcomer.command("export", run, "--to", newcomer.tmp_path / "to")
    tiny_model().save_pretrained(base)


# --- as soon as it shows ---


@case("the loss is 0", "the loss is 0 from the first step on")
def _(newcomer, mistake):
    lost(newcomer, 0.0 if mistake else 1.0)


@case("the loss is not a number", "the loss is nan from the first step on")
def _(newcomer, mistake):
    lost(newcomer, float("nan") if mistake else 1.0)


def lost(newcomer: Newcomer, factor: float) -> None:
    class Scaled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            return factor * super().compute_loss(model, inputs, **more)

    newcomer.train(cls=continual(Scaled))


@case("the loss does not fall", "stage 1 (stage 1): the loss did not fall")
def _(newcomer, mistake):
    newcomer.train([answer(9)] * 4, args={"max_steps": 12, "learning_rate": 0.0 if mistake else 1e-3})


OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
}


@case("out of memory", "training.gradient_checkpointing: true would fit by the estimate")
def _(newcomer, mistake):
    def train(watch: StageWatch, checkpoint: Any) -> int:
        raise OUT_OF_MEMORY["CUDA"]

    if mistake:
        newcomer.monkeypatch.setattr(StageWatch, "train", train)
    newcomer.command("run", newcomer.config(training={"max_steps": 2, "warmup": 0, "micro_batch_size": 8}))


def large(device: str) -> Case:
    def do(newcomer: Newcomer, mistake: bool) -> None:
        class Large(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                if mistake:
                    raise OUT_OF_MEMORY[device]
                return super().training_step(*args, **kwargs)

        newcomer.train(cls=continual(Large))

    return do


for device in OUT_OF_MEMORY:
    lower = "per_device_train_batch_size=2 with gradient_accumulation_steps=2, or"
    case(f"out of memory, drop-in, {device}", lower)(large(device))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize("mistake", [True, False], ids=["mistake", "twin"])
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_and_its_twin_is_not(name, mistake, place, tmp_path, capsys, caplog, monkeypatch):
    newcomer = Newcomer(place, tmp_path, capsys, caplog, monkeypatch)
    says, do = CASES[name]
    do(newcomer, mistake)
    told = " ".join([newcomer.said, *newcomer.warnings])
    if mistake:
        assert says in told
    else:
        assert says not in told
        assert not newcomer.warnings
        assert "holdfast: " not in newcomer.said, "the twin is refused"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_frozen_inputs_get_gradients_through_recomputed_layers(tmp_path):
    """Of this mistake nothing has to be told: transformers lets gradients through by itself."""
    for reentrant in (True, False):
        model = adapted(tiny_model())
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trained(tmp_path, model=model, args={"max_steps": 1, **kwargs})
        moved = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert all(p.abs().sum() > 0 for p in moved)


def test_rows_that_are_odd_and_right_are_trained_on(tmp_path):
    """An empty row among others; a padding token without an embedding where nothing is padded; a loss of one's own."""

    class Own(ContinualTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(inputs["input_ids"]).logits.square().mean()

    tokenizer = tiny_tokenizer()
    ids = [{"input_ids": row, "labels": row} for row in ([], [5, 6, 7], [], [8, 9, 5])]
    tokenizer.pad_token = tokenizer.eos_token
    trained(tmp_path, rows=ids * 4, args={"max_steps": 1}, processing_class=tokenizer)
    equal = [{"input_ids": row, "labels": row} for row in ([5, 6, 7], [8, 9, 5])] * 4
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    model = tiny_model(vocab_size=len(tokenizer) - 1)
    trained(tmp_path, rows=equal, model=model, args={"max_steps": 1}, processing_class=tokenizer)
    masked = [row | {"labels": [-100] * 3} for row in equal]
    trained(tmp_path, Own, masked, args={"max_steps": 1})


def test_advice_on_memory_is_for_the_gpu_that_is_there(tmp_path, monkeypatch):
    """By the estimate's own arguments: what has no CUDA cannot estimate for it."""
    asked = []
    monkeypatch.setattr(memory_estimate, "Estimate", lambda *args: asked.append(args))
    monkeypatch.setattr(memory_estimate, "advice", lambda estimate, micro, room, *args: f"something in {room:,}")
    monkeypatch.setattr(memory, "device_type", lambda: "cuda")
    monkeypatch.setattr(memory, "gpu_memory", lambda: 3 * 2**30)
    config = load_config(tiny_config(tmp_path))
    said = memory.lower_for_training(config, tuners.build(config.tuner), longest=16, micro=8)
    assert f"something in {int(memory.USABLE * 3 * 2**30):,} would fit" in said and "of 3 GiB" in said
    [(*_, device, _)] = asked
    assert device == "cuda"


def test_rates_of_models_as_they_are_trained():
    """No published pair of a rate and a size is told of, and the usual slips are."""
    from holdfast.training.rates import adapter_rate_advice, full_rate_advice

    fine = [(2e-5, 7e9), (5e-6, 8e9), (1e-5, 70e9), (3e-4, 135e6), (1e-4, 1e9), (3e-2, 1e6)]
    slips = [(2e-4, 7e9), (3e-4, 8e9), (1e-3, 1e9), (2e-4, 70e9)]
    assert not any(full_rate_advice(rate, int(weights)) for rate, weights in fine)
    assert all(full_rate_advice(rate, int(weights)) for rate, weights in slips)
    assert not any(map(adapter_rate_advice, (5e-5, 1e-4, 2e-4, 1e-3)))
    assert all(map(adapter_rate_advice, (2e-5, 1e-5)))


def test_the_page_says_what_is_said():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert not [says for says, _ in CASES.values() if says not in page]
