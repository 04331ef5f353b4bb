"""LFPT5: a soft prompt learns to answer the tasks and to generate samples of them, which rehearse past tasks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow, count_supervised, row_length
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.section import Section
from holdfast.engines.saved import saved_tensor
from holdfast.errors import ConfigError
from holdfast.losses import kl_divergence, prediction_nll
from holdfast.losses.chunked import Head
from holdfast.models.head import base, context, head, trained_head
from holdfast.models.seq2seq import start_of
from holdfast.rehearsal.head_check import check_head
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.pseudo import Writing, write_samples
from holdfast.rehearsal.teacher import predicting_states
from holdfast.system.shapes import Count, of_shape

logger = logging.getLogger("holdfast")

WRITTEN = -1  # the number of an extra row that is no pseudo sample but a row in the form of `Writing`


class LFPT5(Method):
    """LFPT5 (Qin and Joty, 2022, arXiv 2110.07298): prompt tuning that generates its rehearsal rows.

    L = L_task + lm_weight * CE(x y | mark of the task) + weight * CE(y' | x') + kl_weight * KL(p_before | p)(y' | x')

    (x', y') are pseudo samples of all past tasks: the model before the stage generates them, prompt and answer, after
    the mark of each task. CE and KL on them are means over their answers' tokens, and p_before is that model. The lm
    term teaches it to generate, on the task's rows (x, y) and on the pseudo samples. The paper trains a soft prompt;
    here the tuner decides. With ``full`` this is close to LAMOL (Sun et al., 2020, arXiv 1909.03329), with a KL term.
    """

    name = "lfpt5"
    default_tuner = "prompt"
    reads_outputs = False
    text_only = "the model writes the prompts of its rows itself, and such a model writes no pictures to ask about"

    class Options(Section):
        lm_weight: float = Field(0.25, ge=0, description="lambda_lm, weight of learning to write rows of the tasks")
        weight: float = Field(1.0, ge=0, description="weight of next-token loss on the pseudo samples' answers")
        kl_weight: float = Field(0.1, ge=0, description="lambda_kl, weight of KL to the model before the stage on them")
        ratio: float = Field(0.25, gt=0, le=100, description="pseudo samples in a step, per task row")
        samples: int = Field(100, ge=1, description="pseudo samples of each past task, written anew before a stage")
        top_k: int = Field(64, ge=1, description="each of their tokens is sampled from so many likeliest ones")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tasks: list[str] = []  # the past tasks
        self.lengths: list[int] = []  # the tokens of each one's longest row
        self.memory = Memory(1, "quota")  # the pseudo samples of this stage
        self.before: list[Tensor] = []  # of p_before: each sample's hidden states, [answer tokens, hidden], on the CPU
        self.head: Head | None = None  # of p_before, if the tuner trains the head
        self.tokens = {"pseudo": 0, "written": 0}  # the supervised tokens of the current step

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        if stage.tokenizer is None:
            raise ConfigError("method 'lfpt5': writes samples, so the trainer needs processing_class, the tokenizer")
        longest = context(stage.model)
        self.room = longest - getattr(stage.model, "virtual_tokens", 0) if longest else None
        start = start_of(stage.model)
        self.writings = [Writing.of(stage.tokenizer, task, start) for task in [*self.tasks, stage.task]]
        options = self.options
        if options.kl_weight:
            check_head(stage, stage.rows[0], self.name)
        self.memory, self.before, self.head = Memory(options.samples * max(1, len(self.tasks)), "quota"), [], None
        if options.weight or options.kl_weight:
            for number, (task, length) in enumerate(zip(self.tasks, self.lengths, strict=True)):
                self._write(stage, number, task, length)
        if options.kl_weight:
            states = zip(self.memory.rows, stage.hidden_states(self.memory.rows), strict=True)
            self.before = [predicting_states(row, hidden).cpu() for row, hidden in states]
            self.head = trained_head(stage.model) if self.before else None

    def declares(self, stage: Stage) -> tuple[str, ...]:
        options, has_samples = self.options, len(self.memory) > 0
        terms = {
            "lfpt5": has_samples and options.weight > 0,
            "lfpt5/kl": has_samples and options.kl_weight > 0,
            "lfpt5/lm": options.lm_weight > 0,
        }
        return tuple(name for name, contributes in terms.items() if contributes)

    def extra_rows(self, step: Step) -> Extra | None:
        options, rows, samples = self.options, list[TokenRow](), list[int]()
        if len(self.memory):
            count = max(1, round(options.ratio * step.rows))
            samples = step.random("lfpt5/pseudo").choices(range(len(self.memory)), k=count)
            rows = [self.memory.rows[i] for i in samples]
        self.tokens["pseudo"] = sum(map(count_supervised, rows))
        if options.lm_weight:
            places = range(len(step.stage.rows) + len(self.memory))
            written = [self._written(step.stage, i) for i in step.random("lfpt5/lm").choices(places, k=step.rows)]
            self.tokens["written"] = sum(map(count_supervised, written))
            rows, samples = [*rows, *written], [*samples, *[WRITTEN] * len(written)]
        return Extra(rows, "beside", samples, logits="supervised") if rows else None

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        options, terms = self.options, dict[str, Tensor]()
        written = [place for place, sample in enumerate(rehearsed.samples) if sample == WRITTEN]
        pseudo = [place for place, sample in enumerate(rehearsed.samples) if sample != WRITTEN]
        counts = step.micro_batches if rehearsed.counts else 0
        if options.lm_weight and written:
            part = rehearsed.of_rows(written)
            nll = prediction_nll(part.predictions(), part.labels).sum()
            terms["lfpt5/lm"] = options.lm_weight * nll * counts / self.tokens["written"]
        if not pseudo:
            return terms
        share, part = counts / self.tokens["pseudo"], rehearsed.of_rows(pseudo)
        student = part.predictions()
        if options.weight:
            terms["lfpt5"] = options.weight * prediction_nll(student, part.labels).sum() * share
        if options.kl_weight:
            hidden = torch.cat([self.before[i] for i in part.samples]).to(student.device)
            divergence, _ = kl_divergence(student, (self.head or head(step.stage.model)).logits(hidden))
            terms["lfpt5/kl"] = options.kl_weight * divergence * share
        return terms

    def after_stage(self, stage: Stage) -> None:
        self.tasks.append(stage.task)
        self.lengths.append(max(map(row_length, stage.rows)))

    def state(self) -> State:
        state = self.memory.state() | {"learned": self.tasks, "longest": self.lengths}
        if self.before:
            state |= {"before": torch.cat(self.before), "answers": [len(hidden) for hidden in self.before]}
        if self.head is not None:
            state |= {f"head/{part}": w for part, w in self.head._asdict().items() if isinstance(w, Tensor)}
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        self.memory.load_state(state, model)
        self.tasks, self.lengths = (
            of_shape(list[str], state["learned"], "learned"),
            of_shape(list[Count], state["longest"], "longest"),
        )
        if len(self.tasks) != len(self.lengths):
            raise ValueError("learned and longest: must have an entry for each past task")
        now, rows, answers = head(model), self.memory.rows, of_shape(list[int], state.get("answers", []), "answers")
        if "before" in state and answers != [count_supervised(row) for row in rows]:
            raise ValueError("answers: must be the number of answer tokens of each row")
        hidden = base(model).config.get_text_config().hidden_size
        before = saved_tensor(state, "before", sum(answers), hidden) if "before" in state else torch.zeros(0)
        self.before = list(torch.split(before, answers)) if "before" in state else []
        parts: dict[str, Any] = {
            part: saved_tensor(state, f"head/{part}", *getattr(now, part).shape).to(now.weight.device)
            for part in now._fields
            if f"head/{part}" in state
        }
        self.head = now._replace(**parts) if parts else None

    def _write(self, stage: Stage, number: int, task: str, length: int) -> None:
        """Generate pseudo samples of a past task into the memory."""
        writing, options = self.writings[number], self.options
        longest = length + writing.extra
        with stage.bar(f"pseudo samples of {task} are written") as on_batch:
            rows = write_samples(
                stage.model,
                writing,
                options.samples,
                length=min(longest, self.room or longest),
                batch_size=stage.micro_batch_size,
                top_k=options.top_k,
                seed=stage.random(f"lfpt5/{number}").getrandbits(63),
                on_batch=on_batch,
            )
        log = logger.info if rows else logger.warning
        log("lfpt5: %d of %d pseudo samples of task %s are whole rows", len(rows), options.samples, task)
        self.memory.add(number, rows, stage.random(f"lfpt5/{number}/order"))

    def _written(self, stage: Stage, place: int) -> TokenRow:
        """One of the task's rows, or of the pseudo samples after them, in the form of its task's ``Writing``."""
        sample = place - len(stage.rows)
        row = stage.rows[place] if sample < 0 else self.memory.rows[sample]
        writing = self.writings[-1 if sample < 0 else self.memory.tasks[sample]]
        return {key: tokens[: self.room] for key, tokens in writing.write(row).items()}
