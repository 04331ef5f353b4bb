"""Rehearsal as one engine: a source of extra samples, and a loss on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model, model_validator
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Extra, Rehearsed, Stage, Step
from holdfast.config.section import Section
from holdfast.data.tokens.build import TOKENS
from holdfast.data.tokens.file import TokenFile, TokenRows
from holdfast.errors import ConfigError
from holdfast.losses import dynamic_weight, next_token_nll
from holdfast.models.head import begin_token, context
from holdfast.rehearsal.buffer import SampleBuffer, drawn_states_are_exact, held_out
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.request import Request
from holdfast.rehearsal.samples import corpus_rows, general_rows
from holdfast.rehearsal.teacher import HiddenTeacher, StateTeacher, cached_teacher, live_states, live_teacher


class Rehearsal(Method):
    """Train on extra samples through an extra loss; any cell of source x loss that makes sense can be asked for.

    ``beside``: L = L_task + ce_weight * CE(samples) + weight * loss(samples), each a mean over its tokens in the
    optimizer step. ``replace``: the samples take the places of task rows, and L is the mean CE over all tokens.
    """

    name = "rehearsal"
    reads_outputs = False

    class Options(Section):
        source: Literal["past", "general", "self", "current"] = Field(
            "past",
            description="past: stored samples of past tasks; general: general texts; self: samples of the model "
            "itself; current: the task's own rows",
        )
        loss: Literal["ce", "kl", "margin", "l1", "l2"] = Field(
            "ce",
            description="ce: next token; kl: to the teacher's distribution; margin, l1, l2: to its hidden states",
        )
        weight: float | Literal["dynamic"] = Field(
            1.0, description="weight of the loss; dynamic: makes it as large as the samples' CE in each micro-batch"
        )
        ce_weight: float = Field(
            0.0, ge=0, description="weight of next-token loss on the same samples, beside the loss"
        )
        way: Literal["beside", "replace"] = Field(
            "beside", description="samples come beside the batch, or replace a share of it"
        )
        ratio: float = Field(0.25, gt=0, description="samples per task row (beside), or share of rows (replace)")
        count: int | None = Field(None, ge=1, description="samples in every optimizer step, instead of a ratio")
        teacher: Literal["start", "previous"] = Field(
            "previous", description="start: the model before the first stage; previous: the model before this stage"
        )
        temperature: float = Field(1.0, gt=0, description="of teacher and student in the kl loss")
        temperature_squared: bool = Field(True, description="the kl loss times temperature^2 (Hinton et al., 2015)")
        direction: Literal["forward", "reverse"] = Field(
            "forward", description="forward: KL(teacher | student); reverse: KL(student | teacher)"
        )
        capacity: int = Field(1000, ge=1, description="past samples that the memory holds, over all tasks")
        policy: Literal["quota", "reservoir"] = Field(
            "quota", description="quota: as many samples of each past task; reservoir: each past row equally likely"
        )
        path: str | None = Field(
            None,
            description="general texts (.txt, .jsonl, .parquet, a folder) or a token file; or a corpus that the model "
            "wrote (`holdfast replay`), without which source self draws samples while training runs",
        )
        dataset: str | None = Field(None, description="a Hugging Face dataset of general texts, instead of a path")
        samples: int = Field(1000, ge=1, description="general samples at most; of a token file, where not given, all")
        max_tokens: int = Field(563, ge=2, description="tokens of a general sample at most, within the context")
        buffer: int = Field(8, ge=1, description="steps whose samples are drawn from the model together")
        length: int | None = Field(
            None, ge=2, description="tokens of a drawn sample; where absent, the model's context, at most 1,024"
        )
        domain: str | list[str] | None = Field(
            None, description="domain whose token drawn samples begin with, or several in turn; else the begin token"
        )
        chat: bool | None = Field(
            None,
            description="draw the user's words and the answer in the chat template; where absent, if there is one and "
            "no domain is given",
        )
        layer: int = Field(-1, description="hidden state of margin, l1 and l2; -1: the last, after the final norm")
        multiple: float = Field(1.0, gt=0, description="thresholds of the margin loss: mean +- multiple * std")
        reduction: Literal["nonzero", "mean"] = Field(
            "nonzero", description="margin loss: mean over the entries that violate (as published), or over all"
        )

        @model_validator(mode="after")
        def _sensible(self) -> Rehearsal.Options:
            for used, keys, reason in self._uses():
                given = [key for key in keys if key in self.model_fields_set]
                if given and not used:
                    raise ValueError(f"{given[0]}: would change nothing, since {reason}")
            for wrong, reason in self._contradictions():
                if wrong:
                    raise ValueError(reason)
            return self

        @property
        def drawn(self) -> bool:
            """Whether the samples are drawn from the model while training runs."""
            return self.source == "self" and self.path is None

        def _uses(self) -> list[tuple[bool, tuple[str, ...], str]]:
            """(whether these keys are used, keys, why they are not)."""
            texts = self.source in ("general", "self")
            return [
                (
                    self.loss == "kl",
                    ("temperature", "temperature_squared", "direction"),
                    f"the loss is {self.loss}, not kl",
                ),
                (self.loss in ("margin", "l1", "l2"), ("layer",), f"the {self.loss} loss takes no hidden layer"),
                (self.loss == "margin", ("multiple", "reduction"), f"the loss is {self.loss}"),
                (self.loss != "ce", ("teacher", "ce_weight"), "the loss is ce, which has no teacher and a weight"),
                (self.source == "past", ("capacity", "policy"), f"source {self.source} has no memory"),
                (texts, ("path",), f"source {self.source} reads no texts"),
                (
                    self.source == "general",
                    ("dataset", "samples", "max_tokens"),
                    f"source {self.source} is not general",
                ),
                (self.source != "current", ("way", "ratio", "count"), "source current is the batch itself"),
                (self.drawn, ("buffer", "length", "domain", "chat"), "only source self without a path draws samples"),
            ]

        def _contradictions(self) -> list[tuple[bool, str]]:
            replace = self.way == "replace"
            return [
                (
                    self.source == "current" and self.loss in ("ce", "margin"),
                    f"source current with loss {self.loss}: "
                    + (
                        "the task's rows have their next-token loss already"
                        if self.loss == "ce"
                        else "the thresholds are those of a fixed set of samples; use l1, l2 or kl"
                    ),
                ),
                (
                    self.source in ("past", "current") and self.teacher == "start" and self.loss != "ce",
                    f"teacher start with source {self.source}: these samples are not known before the first stage, so "
                    "the model at the start cannot be asked about them; use teacher previous",
                ),
                (
                    replace and (self.loss != "ce" or self.weight != 1),
                    "way replace: the samples join the task's own loss, so the loss must be ce with weight 1",
                ),
                (
                    replace and self.count is None and self.ratio >= 1,
                    f"ratio: {self.ratio} would leave no row of the task in a batch; for way replace it is below 1",
                ),
                (
                    self.count is not None and "ratio" in self.model_fields_set,
                    "count: give count (samples in a step) or ratio (samples per task row), not both",
                ),
                (
                    self.weight == "dynamic" and self.loss == "ce",
                    "weight dynamic: the loss is ce itself",
                ),
                (self.weight != "dynamic" and self.weight < 0, f"weight: must not be below 0, as {self.weight} is"),
                (
                    self.source == "general" and (self.path is None) == (self.dataset is None),
                    "path: source general needs texts: give path (a file or folder) or dataset (of Hugging Face)",
                ),
                (
                    self.drawn and self.loss == "margin",
                    "loss margin: its thresholds are those of a fixed set of samples; write one with `holdfast replay` "
                    "and give it as path",
                ),
                (
                    self.drawn and self.loss != "ce" and self.teacher == "start",
                    "teacher start: samples are drawn from the model as it was before the stage, and so is the teacher "
                    "that they come with; use teacher previous, or a path",
                ),
                (
                    bool(self.chat) and self.domain is not None,
                    "chat: a chat begins as its template does, so it takes no domain",
                ),
            ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = Memory(self.options.capacity, self.options.policy)
        self.rows: Sequence[TokenRow] = []  # those of a fixed set
        self.size = 0  # so many of them, from the front, are rehearsed in this stage
        self.held_out: list[TokenRow] = []  # general or own samples that are never rehearsed, to measure forgetting on
        self.buffer: SampleBuffer | None = None  # where samples are drawn while training runs
        self.teacher: HiddenTeacher | StateTeacher | None = None
        self._start: dict[str, Any] = {}  # what the start teacher's cache was made for

    def before_stage(self, stage: Stage) -> None:
        options = self.options
        if options.source == "past":
            self.rows, self.size = list(self.memory.rows), len(self.memory)
        elif options.source != "current" and not options.drawn and not self.rows:
            self._read(stage)
        if self._is_off or not self._has_samples:
            return
        if options.drawn:
            self._draw(stage)
        if options.loss == "ce" or not options.weight or self.teacher is not None:
            return
        if options.source == "current" or options.drawn or isinstance(self.rows, TokenRows):
            self.teacher = live_teacher(options, stage)
            return
        folder = Path(stage.folder, self.name)
        self.teacher, key = cached_teacher(options, stage, self.rows, folder, self._start)
        if options.teacher == "start":
            self._start = key

    @property
    def _is_off(self) -> bool:
        return not (self.options.weight or self.options.ce_weight)

    @property
    def _has_samples(self) -> bool:
        return bool(self.size) or self.options.source == "current" or self.options.drawn

    def declares(self, stage: Stage) -> tuple[str, ...]:
        if self.options.way == "replace" or not self._has_samples:
            return ()
        weights = {self.name: self.options.weight, f"{self.name}/ce": self.options.ce_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def extra_rows(self, step: Step) -> Extra | None:
        options = self.options
        if self._is_off or not self._has_samples:
            return None
        layers = () if options.loss == "ce" else (-1 if options.loss == "kl" else options.layer,)
        logits = options.loss == "ce" or options.ce_weight > 0 or options.weight == "dynamic"
        if options.source == "current":
            return Extra((), "task", layers=layers, logits=logits)
        count = self._count(step.rows)
        if self.buffer is not None:
            rows, samples = self.buffer.rows(step.index, count)
        else:
            rounds, rest = divmod(count, self.size)
            samples = [*range(self.size)] * rounds + step.random(self.name).sample(range(self.size), rest)
            rows = [self.rows[i] for i in samples]
        return Extra(
            rows, options.way, samples, layers, logits, dealt=self.buffer is not None and not self.buffer.together
        )

    def _count(self, task_rows: int) -> int:
        """Samples beside, or in, so many rows of the task."""
        return self.options.count or max(1, round(self.options.ratio * task_rows))

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        options, terms = self.options, {}
        if options.loss == "ce":
            return {self.name: options.weight * rehearsed.share * _mean_nll(rehearsed)}
        if options.weight:
            assert self.teacher is not None
            term = self.teacher.term(rehearsed, batch, step.stage.model)
            weight = dynamic_weight(_mean_nll(rehearsed), term) if options.weight == "dynamic" else options.weight
            terms[self.name] = weight * rehearsed.share * term
        if options.ce_weight:
            terms[f"{self.name}/ce"] = options.ce_weight * rehearsed.share * _mean_nll(rehearsed)
        return terms

    def after_stage(self, stage: Stage) -> None:
        if self.options.source == "past":
            self.memory.add(stage.index, stage.rows, stage.random(self.name))
        self.teacher = self.buffer = None

    def state(self) -> State:
        return self.memory.state() | {"start": self._start}

    def load_state(self, state: State, model: nn.Module) -> None:
        self._start = state["start"]
        self.memory.load_state(state)

    def _draw(self, stage: Stage) -> None:
        """Make ready to draw samples, with the teacher that comes with them where it is the true one."""
        options = self.options
        given: dict[str, Any] = {"length": options.length, "domain": options.domain, "chat": options.chat}
        request = Request.of(self._tokenizer(stage), context(stage.model), begin_token(stage.model), **given)
        if not self.held_out:
            self.held_out = held_out(request, stage)
        before = live_states(options, stage)
        hidden = options.loss == "kl" and drawn_states_are_exact(request, stage)
        seed = f"{stage.seed}/{stage.index}/{self.name}"
        self.buffer = SampleBuffer(request, before, seed, self._count(stage.rows_a_step), options.buffer, hidden)
        if options.loss != "ce" and options.weight:
            self.teacher = HiddenTeacher(options, self.buffer.states if hidden else before, before.head())

    def _read(self, stage: Stage) -> None:
        """Read the fixed set of samples; as many as a tenth are held out, where there are at least ten."""
        options, tokenizer = self.options, self._tokenizer(stage)
        most = context(stage.model)
        length = min(options.max_tokens, most or options.max_tokens)
        if options.source == "self":
            found: Sequence[TokenRow] = corpus_rows(options.path, tokenizer, most)
            self.size = len(found) - len(found) // 11
        elif options.path is not None and Path(options.path, TOKENS).exists():
            found = TokenFile.open(options.path, tokenizer).rows(length)
            self.size = len(found) - min(len(found) // 11, options.samples // 10)
        else:
            asked = options.samples + options.samples // 10
            given = {"path": options.path, "dataset": options.dataset}
            found = general_rows(tokenizer, **given, samples=asked, max_tokens=length, seed=stage.seed)
            self.size = min(options.samples, len(found) - len(found) // 11)
        self.rows, self.held_out = found, list(found[self.size :])
        if isinstance(found, TokenRows) and self._needs_few:
            few = random.Random(f"{stage.seed}/{self.name}").sample(range(self.size), min(options.samples, self.size))
            self.rows, self.size = [found[i] for i in sorted(few)], len(few)

    @property
    def _needs_few(self) -> bool:
        """Whether a token file is too large: the user wants fewer rows, or each must be seen before training."""
        options = self.options
        cached = options.loss != "ce" and (options.loss == "margin" or options.teacher == "start")
        return cached or "samples" in options.model_fields_set

    def _tokenizer(self, stage: Stage) -> Any:
        if stage.tokenizer is None:
            raise ConfigError(
                f"method {self.name}: rehearses texts, so the trainer needs processing_class, the tokenizer"
            )
        return stage.tokenizer


def preset(**defaults: Any) -> Any:
    """Rehearsal's options with other defaults."""
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        field = copy(Rehearsal.Options.model_fields[name])
        field.default = default
        fields[name] = (field.annotation, field)
    return create_model("Options", __base__=Rehearsal.Options, **fields)


def _mean_nll(rehearsed: Rehearsed) -> Tensor:
    assert rehearsed.logits is not None
    nll, tokens = next_token_nll(rehearsed.logits, rehearsed.labels)
    return nll / tokens.clamp(min=1)
