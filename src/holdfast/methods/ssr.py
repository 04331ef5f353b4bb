"""SSR: new rows of past tasks, asked for by the first model, answered by the newest one, are rehearsed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow, count_supervised, last_answer
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.section import Section
from holdfast.data.encode import Encoder
from holdfast.engines.pieces import reshard
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import borrowed, snapshot
from holdfast.errors import ConfigError
from holdfast.losses import prediction_nll
from holdfast.methods.parts.queries import prompt_queries
from holdfast.models.generation import generate
from holdfast.models.head import context
from holdfast.models.sampling import sample
from holdfast.rehearsal.clusters import nearest_to_centres
from holdfast.rehearsal.demonstration import LONG
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.synthesis import Form, usable
from holdfast.system.shapes import Count, of_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger("holdfast")


class SSR(Method):
    """Self-synthesized rehearsal (Huang et al., 2024, arXiv 2403.01244).

    L = CE(task) + weight * CE(y | x), the mean over the tokens of answers to new prompts x of all past tasks. The model
    before the first stage writes x after a few stored rows of the task; the model that has just learned the task writes
    y, greedily. Those x are taken that lie nearest to the centres of clusters of all that were written.
    """

    name = "ssr"
    turn = -4  # the newest model answers: before cia puts another group's weights into it
    reads_outputs = False
    causal_only = "its rows are written as one text, prompt and answer"
    text_only = "its new rows ask about texts that the model writes, and such a model writes no pictures to ask about"
    not_with = dict.fromkeys(
        ("gain_lora", "hide_lora", "inflora", "n_lora", "o_lora", "osf", "seq_lora_merge"),
        "ssr writes with the trained weights of before the first stage, and the other exchanges what is trained",
    )

    class Options(Section):
        weight: float = Field(1.0, ge=0, description="weight of next-token loss on the new rows' answers")
        ratio: float = Field(0.25, gt=0, le=100, description="new rows in a step, per task row")
        samples: int = Field(100, ge=1, description="new rows of each past task")
        candidates: float = Field(3.0, ge=1, description="texts that are written, per new row")
        demonstrations: int = Field(20, ge=1, description="stored rows of a task, until its new rows are written")
        shots: int = Field(2, ge=1, description="of these, rows that each text is written after")
        clusters: int = Field(20, ge=1, description="clusters of prompts, of each of which some are taken")
        temperature: float = Field(0.9, gt=0, description="of the first model's texts")
        top_p: float = Field(
            0.6, gt=0, le=1, description="they are drawn from the likeliest tokens of this probability"
        )
        input: str = Field("Input:", min_length=1, description="what stands before an input where rows are texts")
        output: str = Field("Output:", min_length=1, description="what stands before an answer there")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first: Shards | None = None  # the trained weights before the first stage
        self.pool = Memory(self.options.demonstrations, "quota")  # rows of the task that has no new rows yet
        self.longest = 0  # tokens of that task's longest answer
        self.memory = Memory(1, "quota")  # the new rows

    @property
    def needs_rows(self) -> bool:
        return True

    def try_rows(
        self,
        rows: Sequence[TokenRow],
        describe: Callable[[int], str],
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig,
    ) -> None:
        if self.options.weight:
            usable(rows, tokenizer, describe)

    def before_stage(self, stage: Stage) -> None:
        if not self.options.weight:
            return
        if stage.tokenizer is None:
            raise ConfigError("method ssr: writes rows, so the trainer needs processing_class, the tokenizer")
        self.usable = usable(stage.rows, stage.tokenizer, lambda number: f"task {stage.task!r}, row {number + 1}")
        if self.first is None:
            self.first = snapshot(stage.model)
        if len(self.pool):
            self._synthesise(stage, self.pool.tasks[0])

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if len(self.memory) else ()

    def extra_rows(self, step: Step) -> Extra | None:
        if not len(self.memory):
            return None
        count = max(1, round(self.options.ratio * step.rows))
        return Extra(self.memory.sample(count, step.random(self.name)), "beside", logits="supervised")

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        nll = prediction_nll(rehearsed.predictions(), rehearsed.labels)
        return {self.name: self.options.weight * rehearsed.share * nll.sum() / max(len(nll), 1)}

    def watched(self) -> dict[str, float]:
        return {f"{self.name}/new_rows": float(len(self.memory))} if len(self.memory) else {}

    def after_stage(self, stage: Stage) -> None:
        if self.options.weight:
            self.pool = Memory(self.options.demonstrations, "quota")
            self.pool.add(stage.index, self.usable, stage.random(self.name))
            self.longest = max(len(last_answer(row)[1]) for row in self.usable)

    def state(self) -> State:
        state = self.memory.state() | {f"pool/{key}": value for key, value in self.pool.state().items()}
        return state | {"longest": self.longest} | ({} if self.first is None else self.first.state("first"))

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state, model)
        self.memory.capacity = max(1, len(self.memory))
        pool = {key.removeprefix("pool/"): value for key, value in state.items() if key.startswith("pool/")}
        self.pool.load_state(pool, model)
        self.longest = of_shape(Count, state["longest"], "longest")
        first = any(key.startswith("first/") for key in state)
        self.first = Shards.from_state(state, "first", like=snapshot(model)) if first else None

    def _synthesise(self, stage: Stage, task: int) -> None:
        """Write new rows of the task whose rows are stored, and store them instead."""
        options, process, room = self.options, Process.this(), context(stage.model)
        encoder = Encoder(stage.tokenizer, max_length=LONG)
        form = Form.of(self.pool.rows, encoder, (options.input, options.output))
        written = map(form.prompt, self._inputs(stage, form))
        prompts = [prompt for prompt in written if room is None or len(prompt) + self.longest < room]
        rows: list[TokenRow] = []
        if prompts:
            asked = [{"input_ids": prompt} for prompt in prompts]
            queries = prompt_queries(stage.model, asked, stage.collate, stage.micro_batch_size)
            points, seed = normalize(queries).double().numpy(), stage.random(f"{self.name}/clusters").getrandbits(32)
            chosen = nearest_to_centres(points, options.samples, options.clusters, seed)
            prompts = process.broadcast([prompts[number] for number in chosen])
            with stage.bar(f"{self.name}: inputs are answered") as on_batch:
                answers = generate(
                    stage.model,
                    prompts,
                    max_new_tokens=self.longest + 1,
                    batch_size=stage.micro_batch_size,
                    eos_token_ids=encoder.stop_ids,
                    pad_token_id=0,
                    on_batch=on_batch,
                )
            pairs = zip(prompts, answers, strict=True)
            ends = len(form.end)
            found = [form.row(prompt, answer) for prompt, answer in pairs if len(answer) + ends <= self.longest]
            rows = [row for row in found if count_supervised(row)]
        log = logger.info if len(rows) == options.samples else logger.warning
        log("ssr: %d new rows of the task of stage %d (%d asked for)", len(rows), task, options.samples)
        self.memory.capacity = options.samples * len({*self.memory.tasks, task})
        self.memory.add(task, process.broadcast(rows), stage.random(f"{self.name}/order"))
        self.pool = Memory(options.demonstrations, "quota")

    def _inputs(self, stage: Stage, form: Form) -> list[str]:
        """Different inputs that the first model writes, none of which is that of a stored row."""
        options, size, tokens = self.options, stage.micro_batch_size, list[list[int]]()
        assert self.first is not None
        length = max(len(form.encoder.inside(form.written(row))) for row in self.pool.rows)
        chance, room = stage.random(self.name), context(stage.model)
        requests = [
            self._request(form, chance, length, room) for _ in range(math.ceil(options.candidates * options.samples))
        ]
        with borrowed(stage.model) as theta, stage.bar(f"{self.name}: inputs are written") as on_batch:
            theta.copy_(self.first)
            for start in range(0, len(requests), size):
                on_batch(start, len(requests))
                part = requests[start : start + size]
                tokens += sample(
                    stage.model,
                    part,
                    max_new_tokens=[length if room is None else max(1, min(length, room - len(one))) for one in part],
                    seed=f"{stage.seed}/{stage.index}/{self.name}",
                    numbers=range(start, start + len(part)),
                    temperature=options.temperature,
                    top_p=options.top_p,
                    stop_token_ids=form.encoder.stop_ids,
                    on_token=stage.check_stop,
                ).tokens
            reshard(stage.model)  # as the weights are exchanged
        stored = {form.input(row) for row in self.pool.rows}
        found = dict.fromkeys(text for one in tokens for text in form.read(one))
        return Process.this().broadcast([text for text in found if text not in stored])

    def _request(self, form: Form, chance: Random, length: int, room: int | None) -> list[int]:
        """What the first model continues: after as many stored rows as fit, with room for a further one."""
        rows = chance.sample(self.pool.rows, min(self.options.shots, len(self.pool)))
        while rows and room is not None and len(form.request(rows)) + length > room:
            rows.pop()
        return form.request(rows)
