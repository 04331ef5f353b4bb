"""Rehearsal of rows that show pictures: memories, general samples, answers to given prompts, beside plain loops."""

from __future__ import annotations

import copy
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from holdfast.api.rows import bare, last_answer
from holdfast.api.stage import Rehearsed, Stage, Step
from holdfast.config.model import ModelConfig
from holdfast.config.sizes import byte_size
from holdfast.data.collate import Collator
from holdfast.data.encode_apart import encoder_of
from holdfast.data.formats import to_examples
from holdfast.errors import ConfigError, DataError
from holdfast.losses import margin_loss
from holdfast.losses.next_token import predicting
from holdfast.methods.rehearsal import Rehearsal
from holdfast.models.pictures import forget, is_place, pictures_in
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sampling import sample
from holdfast.models.sight import callable_with_pictures, load_sight
from holdfast.models.weights import load_language_model
from holdfast.rehearsal.demonstration import Demonstration
from holdfast.rehearsal.memory import Memory
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from support import resumed
from support.sight import seeing_config, seeing_model, write_pictures, write_seeing

TEXTS = [{"text": "the sea moves a weed"}, {"text": "a tide"}]


def shake(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


class Seen:
    """A tiny LLaVA as holdfast loads it, the same one plain beside its processor, and rows of both.

    Attributes:
        general: a file of rows with pictures, and of texts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        write_seeing(folder / "model")
        config = ModelConfig(name=str(folder / "model"))
        self.config, self.tokenizer = load_model_config(config), load_tokenizer(config)
        sight = load_sight(config, self.config, self.tokenizer)
        self.model = callable_with_pictures(load_language_model(folder / "model").eval(), sight)
        self.plain, self.processor = seeing_model()
        self.encoder = encoder_of(self.config, self.tokenizer, sight, max_length=256)
        self.asked = [
            {"image": name, "prompt": f"what is {number}?", "answer": "abcdefgh"[: 2 + number]}
            for number, name in enumerate(write_pictures(folder, 5))
        ]
        self.general = folder / "general.jsonl"
        self.general.write_text("".join(json.dumps(row) + "\n" for row in [*self.asked, *TEXTS]))

    def rows(self) -> list[Any]:
        examples = to_examples(self.asked, "prompt_answer", file=self.folder / "train.json")
        return [bare(row) for row in self.encoder.encode_all(examples)]

    def stage(self, index: int = 1, **changes: Any) -> Stage:
        return Stage(
            index, "red", self.model, self.rows(), Collator(0), 0, 4, self.folder / "rehearsal",
            tokenizer=self.tokenizer, rows_a_step=8, encode=self.encoder.encode_all, **changes,
        )  # fmt: skip

    @torch.no_grad()
    def passed(self, plain: Any, number: int) -> tuple[Any, Any, Any]:
        """Tokens, logits and last hidden states of a general sample, by the processor and the plain model."""
        if number < len(self.asked):
            row = self.asked[number]
            said = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
            chat = [{"role": "user", "content": said}, {"role": "assistant", "content": row["answer"]}]
            text = self.processor.tokenizer.apply_chat_template(chat, tokenize=False)
            images = [[Image.open(self.folder / row["image"]).convert("RGB")]]
            inputs = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        else:
            text = TEXTS[number - len(self.asked)]["text"]
            inputs = self.processor.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        out = plain(**inputs, output_hidden_states=True)
        return inputs["input_ids"][0], out.logits[0], out.hidden_states[-1][0]


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    return Seen(tmp_path)


def term(method: Rehearsal, stage: Stage, rows: list[Any], samples: list[int]) -> float:
    """The method's term on some of its samples, under the model's current weights."""
    batch = Collator(0)(rows)
    labels, layer = batch["labels"], method.options.compared_layer
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = stage.model(**inputs, output_hidden_states=True)
        step = Step(stage, 0, len(rows), 1, True)
        logits = out.logits[predicting(labels)]
        step.rehearsed = {
            method.name: Rehearsed(samples, labels, logits, (out.hidden_states[layer],), 1.0, batch=batch)
        }
        return float(method.loss_terms(step, {}, None)[method.name])


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("loss", ["ce", "kl", "l1", "l2", "margin"])
def test_general_rows_with_pictures_are_compared_over_answers_and_texts(seen: Seen, loss: str, places: bool):
    if places and loss in ("ce", "kl"):
        with pytest.raises(ConfigError, match="places: would change nothing"):
            Rehearsal(source="general", path="x", loss=loss, places=True)
        return
    given = {"places": True} if places else {}
    method = Rehearsal(source="general", path=str(seen.general), loss=loss, **given)
    stage = seen.stage()
    method.before_stage(stage)
    assert (
        len(method.rows) == 7
        and [bool(pictures_in(row["input_ids"])) for row in method.rows] == [True] * 5 + [False] * 2
    )
    before = seen.plain
    after = copy.deepcopy(before)
    shake(seen.model)
    shake(after)
    found = term(method, stage, list(method.rows), list(range(7)))
    old, new = ([seen.passed(plain, number) for number in range(7)] for plain in (before, after))
    image = seen.config.image_token_index
    counted = [torch.ones_like(ids, dtype=torch.bool) if places else ids != image for ids, _, _ in old]
    states = [
        torch.cat([hidden[mask] for (_, _, hidden), mask in zip(side, counted, strict=True)]) for side in (old, new)
    ]
    if loss in ("ce", "kl"):
        labels = [torch.tensor(row["labels"][1:]) for row in method.rows]
        assert all(label != seen.config.image_token_index for row in labels for label in row)
        p, q = (
            torch.cat([logits[:-1][label != -100] for (_, logits, _), label in zip(side, labels, strict=True)])
            for side in (old, new)
        )
        targets = torch.cat([label[label != -100] for label in labels])
        wanted = (
            F.cross_entropy(q, targets)
            if loss == "ce"
            else F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
        )
    elif loss == "margin":
        mean, std = states[0].double().mean(0), states[0].double().std(0, correction=0)
        low, high = (mean - std).float(), (mean + std).float()
        classes = (states[0] > low).int() + (states[0] >= high).int()
        wanted = margin_loss(states[1], classes, low, high)
    else:
        wanted = F.l1_loss(*states) if loss == "l1" else F.mse_loss(*states)
    assert found == pytest.approx(float(wanted), rel=2e-3)


@pytest.mark.slow
def test_a_mean_over_texts_does_not_depend_on_micro_batches(tmp_path: Path):
    """Rows with pictures and texts fall into micro-batches as it happens; each token counts the same."""
    logged = []
    for micro in (8, 2):
        folder = tmp_path / str(micro)
        config = seeing_config(folder, method=[])
        general = folder / "general.jsonl"
        names = write_pictures(folder, 6, seed=7)
        rows = [{"image": name, "prompt": "is it?", "answer": "no"} for name in names] + TEXTS * 3
        general.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config["method"] = [{"name": "gere_l2", "path": str(general), "ratio": 0.5, "teacher": "previous"}]
        config["training"] |= {"micro_batch_size": micro, "max_steps": 4}
        run(config | {"evaluation": {"max_new_tokens": 1, "bootstrap": 0, "shift": 0}}, Progress(quiet=True))
        events = map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
        logged.append([event["terms"] for event in events])
    assert max(terms["gere_l2"] for terms in logged[0]) > 1e-4
    for one, two in zip(*logged, strict=True):
        assert one == pytest.approx(two, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("policy", ["reservoir", "quota", "surprise", "loss", "diversity"])
def test_memories_choose_among_rows_with_pictures(seen: Seen, policy: Any):
    method, stage = Rehearsal(policy=policy, capacity=2), seen.stage()
    method.before_stage(stage)
    method.after_stage(stage)
    assert len(method.memory) == 2 and all(pictures_in(row["input_ids"]) for row in method.memory.rows)
    if policy in ("surprise", "loss"):
        means = []
        for number, row in enumerate(seen.rows()):
            ids, logits, _ = seen.passed(seen.plain, number)
            labels = ids[1:].clone() if policy == "surprise" else torch.tensor(row["labels"][1:])
            labels[ids[1:] == seen.config.image_token_index] = -100
            means.append(float(F.cross_entropy(logits[:-1], labels)))
        assert method.memory.places == sorted(range(5), key=lambda place: -means[place])[:2]
    state = method.state()
    again = Rehearsal(policy=policy, capacity=2)
    again.load_state(state, seen.model)
    assert again.memory.rows == method.memory.rows
    second = seen.stage(2)
    forget(pictures_in(again.memory.rows[0]["input_ids"]))
    with pytest.raises(DataError, match=r"row \d of stage 1: a row shows picture \w+ .*put the file back"):
        again.before_stage(second)


@pytest.mark.parametrize("policy", ["quota", "loss", "reservoir"])
def test_a_memory_has_no_more_bytes_of_pictures_than_it_may(seen: Seen, policy: Any):
    rows = seen.rows()
    sizes = [pictures_in(row["input_ids"])[0].size_of_file for row in rows]
    most = sum(sorted(sizes)[:3])
    memory = Memory(4, policy, most)
    preferred = [3, 1, 0, 2, 4] if policy == "loss" else None
    for stage in (1, 2):
        memory.add(stage, rows, random.Random(stage), preferred)
        shown = {picture for row in memory.rows for picture in pictures_in(row["input_ids"])}
        assert 0 < sum(picture.size_of_file for picture in shown) <= most
    if policy == "loss":  # a picture that two tasks show counts once
        assert {memory.places[slot] for slot in range(len(memory))} <= {3, 1}
    text = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    memory.add(3, text * 9, random.Random(0))
    assert any(row["input_ids"] == [5, 6] for row in memory.rows)
    free = Memory(4, policy, None)
    free.add(1, rows, random.Random(1), preferred)
    assert len(free) == 4


def test_sizes_are_read_as_people_write_them():
    assert [byte_size(size) for size in (7, "7", "2GB", "1.5 mb", "1KiB")] == [7, 7, 2 * 10**9, 1_500_000, 1024]
    with pytest.raises(ConfigError, match=r"pictures: .*'two' is no size"):
        Rehearsal(pictures="two")
    with pytest.raises(ConfigError, match="pictures: would change nothing"):
        Rehearsal(source="general", path="x", pictures="2GB")


def test_the_model_answers_given_prompts(seen: Seen):
    """Samples are answers to the rows' pictures and questions, and KL is that to the model that gave them."""
    method, stage = (
        Rehearsal(source="self", loss="kl", prompts=str(seen.general.with_name("asked.json")), length=4),
        seen.stage(),
    )
    seen.general.with_name("asked.json").write_text(json.dumps(seen.asked))
    method.before_stage(stage)
    prompts = {tuple(last_answer(row)[0]): number for number, row in enumerate(seen.rows())}
    rows, samples = method.buffer.rows(0, 6)
    asked = [prompts[tuple(last_answer(row)[0])] for row in rows]
    for row, number in zip(rows, samples, strict=True):
        prompt, answer = last_answer(row)
        seed = f"0/1/{method.name}"
        alone = sample(seen.model, [prompt], max_new_tokens=4, seed=seed, numbers=[number], stop_token_ids=[2])
        assert alone.tokens == [answer] and 0 < len(answer) <= 4
    before, after = seen.plain, copy.deepcopy(seen.plain)
    shake(seen.model)
    shake(after)
    found, total, count = term(method, stage, rows, samples), 0.0, 0
    for row, number in zip(rows, asked, strict=True):
        answer = last_answer(row)[1]
        image = [[Image.open(seen.folder / seen.asked[number]["image"]).convert("RGB")]]
        pixels = seen.processor.image_processor(image, return_tensors="pt")
        ids = torch.tensor([[seen.config.image_token_index if is_place(t) else t for t in row["input_ids"]]])
        with torch.no_grad():
            p, q = (plain(input_ids=ids, **pixels).logits[0, -len(answer) - 1 : -1] for plain in (before, after))
        total += float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
        count += len(answer)
    assert found == pytest.approx(total / count, rel=2e-3)
    assert {tuple(last_answer(row)[0]) for row in method.held_out} <= prompts.keys()


def test_prompts_of_past_tasks_are_those_of_a_memory(seen: Seen):
    method = Rehearsal(source="self", prompts="past", capacity=3, length=4)
    stage = seen.stage()
    method.before_stage(stage)
    assert method.declares(stage) == () and method.needs_rows
    method.after_stage(stage)
    state, again = method.state(), Rehearsal(source="self", prompts="past", capacity=3, length=4)
    again.load_state(state, seen.model)
    second = seen.stage(2)
    again.before_stage(second)
    assert again.declares(second) == ("rehearsal",)
    rows, _ = again.buffer.rows(0, 2)
    stored = [last_answer(row)[0] for row in again.memory.rows]
    assert rows and all(last_answer(row)[0] in stored for row in rows)


def test_what_cannot_be_asked_is_refused(seen: Seen, tmp_path: Path):
    for given in ({"source": "general", "path": "x"}, {"source": "self", "path": "x"}):
        with pytest.raises(ConfigError, match="prompts: would change nothing"):
            Rehearsal(**given, prompts="past")
    with pytest.raises(ConfigError, match="chat: would change nothing, since the model answers given prompts"):
        Rehearsal(source="self", prompts="past", chat=True)
    with pytest.raises(ConfigError, match=r"prompts: there is no file or folder 'gone.jsonl'"):
        run(seeing_config(tmp_path / "a", method={"name": "kl_replay", "prompts": "gone.jsonl"}), Progress(quiet=True))
    with pytest.raises(DataError, match=r"general.jsonl: row 6 .*is a text, which asks nothing"):
        run(
            seeing_config(tmp_path / "b", method={"name": "kl_replay", "prompts": str(seen.general)}),
            Progress(quiet=True),
        )
    (seen.folder / seen.asked[1]["image"]).unlink()
    with pytest.raises(DataError, match=r"general.jsonl: row 2 .*'0-1.png' cannot be read"):
        run(seeing_config(tmp_path / "c", method={"name": "gere_ce", "path": str(seen.general)}), Progress(quiet=True))
    for name in ("ssr", "lfpt5"):
        config = seeing_config(tmp_path / "b", method=name, tuner="lora")
        with pytest.raises(ConfigError, match=f"method {name}: the model sees .*writes no pictures to ask about"):
            run(config, Progress(quiet=True))


def test_a_demonstration_stands_beside_the_same_picture(seen: Seen):
    shown = Demonstration(seen.tokenizer, " say {demonstration}!")
    row = seen.rows()[1]
    prompt, demonstrated = shown.show(row)
    places = [token for token in prompt if is_place(token)]
    assert places and [token for token in demonstrated if is_place(token)] == places
    text = seen.tokenizer.decode([token for token in demonstrated if not is_place(token)])
    assert text == "[user]what is 1? say abc!</s>[assistant]"


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_5_vl", "smolvlm"))]
)
def test_every_source_trains_on_pictures(tmp_path: Path, name: str):
    config = seeing_config(tmp_path, name)
    names = write_pictures(tmp_path, 4, seed=7)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"image": n, "prompt": "is it?", "answer": "no"}) + "\n" for n in names))
    config["method"] = [
        "replay", "lwf", {"name": "gere_kl", "path": str(asked)}, {"name": "gere", "path": str(asked), "weight": 1.0},
        {"name": "self_replay", "prompts": "past", "length": 3},
        {"name": "kl_replay", "prompts": str(asked), "length": 3},
    ]  # fmt: skip
    config["training"] |= {"max_steps": 3}
    run(config, Progress(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    last = events[-1]["terms"]
    for method in ("replay", "lwf", "gere_kl", "gere", "self_replay", "kl_replay"):
        assert last[method] > 1e-7, (method, last)


def test_sdft_learns_from_answers_shown_beside_pictures(tmp_path: Path):
    config = seeing_config(tmp_path, method={"name": "sdft", "max_new_tokens": 4, "shown": " say {demonstration}"})
    run(config | {"training": config["training"] | {"max_steps": 3}}, Progress(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert all(event["terms"]["sdft"] > 1e-6 for event in events)


@pytest.mark.parametrize("tuner", [pytest.param("full", marks=pytest.mark.slow), {"name": "lora", "r": 2}])
def test_a_run_that_is_killed_goes_on_with_its_memory_of_pictures(tmp_path: Path, tuner: Any):
    config = seeing_config(tmp_path, tuner=tuner, method={"name": "replay", "capacity": 6})
    whole, broken = (tmp_path / f"{kind}.json" for kind in ("whole", "broken"))
    for file in (whole, broken):
        file.write_text(json.dumps(config | {"output": str(tmp_path / file.stem)}))
    unbroken = resumed.start(whole)
    for point in (("weights", 1), ("step", 4)):
        assert resumed.finish(resumed.start(broken, *point)) == -signal.SIGKILL, point
    assert resumed.finish(resumed.start(broken)) == 0
    assert resumed.finish(unbroken) == 0
    one, two = resumed.results(tmp_path / "whole"), resumed.results(tmp_path / "broken")
    assert any("replay" in terms for _, _, terms in one["steps"])
    for key in one:
        assert one[key] == two[key], key
