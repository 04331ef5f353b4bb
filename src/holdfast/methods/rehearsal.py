"""Rehearsal as one engine: a source of extra samples, and a loss on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Encode, Extra, Rehearsed, Stage, Step
from holdfast.config.sizes import byte_size
from holdfast.data.encode_seen import SeeingEncoder
from holdfast.data.tokens.build import TOKENS
from holdfast.data.tokens.file import TokenFile
from holdfast.errors import ConfigError
from holdfast.losses import dynamic_weight, prediction_nll, supervised_tokens
from holdfast.models.head import begin_token, context
from holdfast.models.kinds import is_seq2seq
from holdfast.models.seq2seq import decoder_start, empty_prompt, start_of, text_row
from holdfast.models.sight import sight_of
from holdfast.rehearsal.buffer import SampleBuffer, drawn_states_are_exact, held_out
from holdfast.rehearsal.cache import cached_rows
from holdfast.rehearsal.head_check import TOKENS as COMPARED
from holdfast.rehearsal.head_check import check_head
from holdfast.rehearsal.memory import Memory, Without
from holdfast.rehearsal.options import PAST, RehearsalOptions
from holdfast.rehearsal.ranking import by_diversity, by_loss, by_surprise
from holdfast.rehearsal.request import Prompts, Request, SampleOptions
from holdfast.rehearsal.samples import corpus_rows, general_rows, prompted_rows, rows_fingerprint
from holdfast.rehearsal.teacher import HiddenTeacher, LiveStates, StateTeacher, cached_teacher, live_teacher
from holdfast.rehearsal.violations import violations
from holdfast.system.shapes import Facts, of_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Rehearsal(Method):
    """Train on extra samples through an extra loss; every sensible cell of source x loss can be asked for.

    ``beside``: L = L_task + ce_weight * CE(samples) + weight * loss(samples), each a mean over its tokens in the
    optimizer step. ``replace``: the samples take the places of task rows, and L is the mean CE over all tokens.
    """

    name = "rehearsal"
    reads_outputs = False
    inputs = ("path", "dataset", "prompts")
    Options = RehearsalOptions
    options: RehearsalOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        most = None if self.options.pictures is None else byte_size(self.options.pictures)
        self.memory = Memory(self.options.capacity, self.options.policy, most)
        self.prompts: Sequence[TokenRow] = ()  # rows whose prompts the model answers, where it is given some
        self.rows: Sequence[TokenRow] = []  # a fixed set of samples
        self.size = 0  # of these, the number that are rehearsed in this stage, counted from the first
        self.buffer: SampleBuffer | None = None  # draws samples while training runs
        self.teacher: HiddenTeacher | StateTeacher | None = None
        self.violations: int | None = None  # of the margin loss in the step at work, where it has several micro-batches
        self._seed: int | None = None  # of the choice among general samples: that of the first stage, which chose
        self._start: dict[str, Any] = {}  # the key of the start teacher's cache
        self.multipliers: dict[int, float] | None = None  # of a budget, by constraint; None: there is no budget
        self.reserve: Callable[[Stage], Sequence[int]] = lambda stage: ()  # places of train rows never rehearsed
        self.measured: int | None = None  # samples of a fixed set that a budget is measured on, at most
        self._surprising: list[int] = []  # places of the stage's rows, the most surprising first
        self._is_token_file = False
        self._held_out: Sequence[TokenRow] = ()
        self._draw_held_out: Callable[[], list[TokenRow]] | None = None  # before the first step that follows

    @property
    def held_out(self) -> Sequence[TokenRow]:
        """Samples that are never rehearsed; where they are drawn from the model, it draws them when they are first
        asked for, which takes as long as many steps."""
        if not self._held_out and self._draw_held_out is not None:
            self._held_out = self._draw_held_out()
        return self._held_out

    @property
    def needs_rows(self) -> bool:
        options = self.options
        return options.remembers or options.source == "current" or options.way == "replace"

    @property
    def needs_token_batches(self) -> bool:
        return self.options.source == "current" or self.options.way == "replace"

    def try_samples(self, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, encode: Encode) -> None:
        options = self.options
        config = model_config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if options.prompts is not None:
            if options.prompts != PAST:
                Prompts.of(prompted_rows(options.prompts, encode), tokenizer, most, options.length)
        elif options.drawn:
            start = decoder_start(config) if is_seq2seq(config) else None
            Request.of(tokenizer, most, getattr(config, "bos_token_id", None), self._wanted, start)
        elif options.source == "self" and options.path is not None:
            corpus_rows(options.path, tokenizer, most)
        elif options.path is not None and Path(options.path, TOKENS).exists():
            TokenFile.open(options.path, tokenizer)
        elif options.path is not None:
            general_rows(tokenizer, path=options.path, samples=1, encode=encode)

    def before_stage(self, stage: Stage) -> None:
        options = self.options
        self.memory.check_pictures()
        if options.remembers and options.policy == "surprise":
            self._surprising = by_surprise(stage, self._offered(stage))
        if options.source == "past":
            self.rows, self.size = list(self.memory.rows), len(self.memory)
        elif options.prompts is not None:
            self._take_prompts(stage)
        elif options.source != "current" and not options.drawn and not self.rows:
            self._read(stage)
        if self._is_off or not self._has_samples:
            return
        if options.drawn:
            self._draw(stage)
        if options.loss == "kl" and options.weight:
            check_head(stage, self._any_row(stage), self.name)
        if options.loss == "ce" or not options.weight or self.teacher is not None:
            return
        if options.source == "current" or options.drawn or self._is_token_file:
            self.teacher = live_teacher(options, stage)
            return
        folder, rows = Path(stage.folder, self.name), self.rows[: self.size]
        if len(rows) < len(self.rows) and cached_rows(folder) == rows_fingerprint(self.rows):
            rows = self.rows  # a run of 0.1.0, whose teacher was asked about held-out texts, too
        self.teacher, key = cached_teacher(options, stage, rows, folder, self._start)
        if options.teacher == "start":
            self._start = key

    def _any_row(self, stage: Stage) -> TokenRow:
        """Some tokens, of a sample where there is one already."""
        if self.rows or self.options.source == "current":
            return (self.rows or stage.rows)[0]
        [row] = self._as_read(stage, [{"input_ids": [*range(COMPARED)], "labels": [*range(COMPARED)]}])
        return row

    def _as_read(self, stage: Stage, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of texts as the model reads them: a sequence-to-sequence one as answers to an empty prompt."""
        start = start_of(stage.model)
        if start is None:
            return texts
        prompt = empty_prompt(self._tokenizer(stage))
        return [text_row(row, start, prompt) for row in texts]

    def _take_prompts(self, stage: Stage) -> None:
        """Take the rows whose prompts the model answers in this stage."""
        if self.options.prompts == PAST:
            self.prompts = list(self.memory.rows)
        elif not self.prompts:
            assert self.options.prompts is not None
            encode = self._encode(stage)
            if encode is None:
                raise ConfigError(f"method {self.name}: prompts: only `holdfast run` knows how rows become prompts")
            self.prompts = prompted_rows(self.options.prompts, encode)

    @property
    def _wanted(self) -> SampleOptions:
        return SampleOptions(length=self.options.length, domain=self.options.domain, chat=self.options.chat)

    @property
    def _is_off(self) -> bool:
        return not (self.options.weight or self.options.ce_weight)

    @property
    def _has_samples(self) -> bool:
        if self.options.prompts is not None:
            return bool(self.prompts)
        return bool(self.size) or self.options.source == "current" or self.options.drawn

    @property
    def _multiplier(self) -> float:
        """The sum of a budget's multipliers, which the terms are multiplied by."""
        return 1.0 if self.multipliers is None else sum(self.multipliers.values())

    def declares(self, stage: Stage) -> tuple[str, ...]:
        if self.options.way == "replace" or not self._has_samples:
            return ()
        weights = {self.name: self.options.weight, f"{self.name}/ce": self.options.ce_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def may_rest(self, stage: Stage) -> tuple[str, ...]:
        """The distance from the teacher's activations or distribution, which a stage may hardly leave."""
        return () if self.options.loss == "ce" else (self.name,)

    def may_be_absent(self, stage: Stage) -> tuple[str, ...]:
        """Every term of a method that a budget weighs: a budget that is not touched needs no rehearsal."""
        return () if self.multipliers is None else self.declares(stage)

    def extra_rows(self, step: Step) -> Extra | None:
        options = self.options
        if self._is_off or not self._has_samples or not self._multiplier:
            return None
        layers = () if options.loss == "ce" else (options.compared_layer,)
        needs_logits = options.loss == "ce" or options.ce_weight > 0 or options.weight == "dynamic"
        logits: Literal["supervised", False] = "supervised" if needs_logits else False
        if options.source == "current":
            return Extra((), "task", layers=layers, logits=logits)
        count = self._count(step.rows)
        if self.buffer is not None:
            rows, samples = self.buffer.rows(step.index, count)
            return Extra(rows, options.way, samples, layers, logits, per_process=not self.buffer.together)
        samples = self._choice(step, count)
        extra = Extra([self.rows[i] for i in samples], options.way, samples, layers, logits)
        self.violations = None
        several = step.micro_batches > 1 and options.violations_only and not isinstance(options.weight, str)
        if several and isinstance(self.teacher, StateTeacher):
            self.violations = violations(step.stage, extra, self.teacher)
        return extra

    def _count(self, task_rows: int) -> int:
        """Number of samples that go with so many rows of the task."""
        return self.options.count or max(1, round(self.options.ratio * task_rows))

    def _choice(self, step: Step, count: int) -> list[int]:
        """Numbers of samples; those of a past task come in proportion to its multiplier, if there is a budget."""
        chance = step.random(self.name)
        if self.multipliers is not None and self.options.source == "past":
            tasks = self.memory.tasks
            weights = [self.multipliers.get(task, 0.0) / tasks.count(task) for task in tasks]
            return chance.choices(range(self.size), weights, k=count)
        rounds, rest = divmod(count, self.size)
        return [*range(self.size)] * rounds + chance.sample(range(self.size), rest)

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        weight, terms = self.options.weight, dict[str, Tensor]()
        if self.options.loss == "ce":
            assert not isinstance(weight, str)
            terms[self.name] = weight * rehearsed.share * _mean_nll(rehearsed)
        elif weight:
            terms[self.name] = self._against_teacher(rehearsed, step, batch)
        if self.options.ce_weight:
            terms[f"{self.name}/ce"] = self.options.ce_weight * rehearsed.share * _mean_nll(rehearsed)
        return terms if self.multipliers is None else {name: self._multiplier * t for name, t in terms.items()}

    def _against_teacher(self, rehearsed: Rehearsed, step: Step, batch: Batch) -> Tensor:
        """The weighted loss: this micro-batch's part of the mean over the step's entries."""
        assert self.teacher is not None
        options = self.options
        total, entries = self.teacher.sums(rehearsed, batch, step.stage.model)
        if self.violations is not None:
            assert not isinstance(options.weight, str)
            return options.weight * rehearsed.counts * step.micro_batches * total / max(self.violations, 1)
        mean = total / entries.clamp(min=1)  # a process without rows of its own has no entry
        factor = (
            dynamic_weight(self._mean_ce(step, rehearsed), mean) if isinstance(options.weight, str) else options.weight
        )
        if options.loss == "kl":
            return factor * rehearsed.share * mean
        return factor * (rehearsed.whole_share if options.places else rehearsed.token_share) * mean

    @staticmethod
    def _mean_ce(step: Step, rehearsed: Rehearsed) -> Tensor:
        """The mean of the task's loss and the samples' CE in this micro-batch; where the task has none, the latter."""
        ce = _mean_nll(rehearsed).detach()
        return ce if step.task_loss is None else (step.task_loss.to(ce) + ce) / 2

    def after_stage(self, stage: Stage) -> None:
        if self.options.remembers:
            rows = self._offered(stage)
            self.memory.add(stage.index, rows, stage.random(self.name), self._preferred(stage, rows))
        self.teacher = self.buffer = self._draw_held_out = None

    def _offered(self, stage: Stage) -> Sequence[TokenRow]:
        """The rows of a stage that the memory may keep."""
        return Without(stage.rows, self.reserve(stage))

    def _preferred(self, stage: Stage, rows: Sequence[TokenRow]) -> list[int] | None:
        """The places of the rows that the memory keeps first, as its policy says; None: it takes random ones."""
        match self.options.policy:
            case "surprise":
                return self._surprising
            case "loss":
                return by_loss(stage, rows)
            case "diversity":
                return by_diversity(stage, list(rows), self.options.capacity)
        return None

    def state(self) -> State:
        return self.memory.state() | {"start": self._start, "seed": self._seed}

    def load_state(self, state: State, model: nn.Module) -> None:
        self._start = of_shape(Facts, state["start"], "start")
        self._seed = of_shape(int | None, state.get("seed"), "seed")
        self.memory.load_state(state, model)

    def _draw(self, stage: Stage) -> None:
        """Prepare to draw samples, and take the hidden states that they are drawn from as the teacher's if exact."""
        options = self.options
        request, apart = self._requests(stage)
        self._draw_held_out = partial(held_out, apart, stage)
        before = LiveStates(stage.model, options.compared_layer)
        hidden = options.loss == "kl" and drawn_states_are_exact(request, stage)
        seed = f"{stage.seed}/{stage.index}/{self.name}"
        count = self._count(stage.rows_a_step)
        self.buffer = SampleBuffer(request, before, seed, count, options.buffer, hidden, stage.bar)
        if options.loss != "ce" and options.weight:
            self.teacher = HiddenTeacher(options, self.buffer.states if hidden else before, before.head())

    def _requests(self, stage: Stage) -> tuple[Request | Prompts, Request | Prompts]:
        """What the model is asked for samples, and for those that are never rehearsed: of given prompts, the last
        eleventh."""
        model, tokenizer = stage.model, self._tokenizer(stage)
        most, start = context(model), start_of(model)
        if self.options.prompts is None:
            request = Request.of(tokenizer, most, begin_token(model), self._wanted, start)
            return request, request
        rows = list(self.prompts)
        held = self._held(len(rows))
        parts = (rows[: len(rows) - held], rows[len(rows) - held :] or rows)
        mine, apart = (Prompts.of(part, tokenizer, most, self.options.length, start) for part in parts)
        return mine, apart

    def _read(self, stage: Stage) -> None:
        """Read the fixed set of samples, of which some are held out: the last eleventh, if there are at least eleven;
        for a budget a random choice of at most a fifth."""
        options, tokenizer = self.options, self._tokenizer(stage)
        seed = self._seed = stage.seed if self._seed is None else self._seed
        most, apart = context(stage.model), start_of(stage.model) is not None
        if most is not None and apart:
            most -= 1  # the decoder's start token takes a place
        length = min(options.max_tokens, most or options.max_tokens)
        most_held = options.samples // 10 if self.measured is None else self.measured
        if options.source == "self":
            assert options.path is not None
            rows: Sequence[TokenRow] = self._as_read(stage, corpus_rows(options.path, tokenizer, most))
            held = self._held(len(rows))
        elif options.path is not None and Path(options.path, TOKENS).exists():
            if apart:
                raise ConfigError(
                    f"method {self.name}: path: {options.path} is a token file, which holds one stream of tokens for a "
                    "causal model; give a sequence-to-sequence model texts"
                )
            rows = TokenFile.open(options.path, tokenizer).rows(length)
            held, self._is_token_file = min(self._held(len(rows)), most_held), True
        else:
            sight = sight_of(stage.model)
            texts = general_rows(
                tokenizer,
                path=options.path,
                dataset=options.dataset,
                samples=options.samples + most_held,
                max_tokens=length,
                seed=seed,
                encode=self._encode(stage),
                no_text=None if sight is None else sight.image_token,
            )
            rows = self._as_read(stage, texts)
            held = max(self._held(len(rows)), len(rows) - options.samples)
        self.rows, self.size = rows, len(rows) - held
        self._held_out = list(rows[self.size :])
        if self.measured is not None:
            places = sorted(random.Random(f"{seed}/{self.name}/held out").sample(range(len(rows)), held))
            self._held_out = [rows[place] for place in places]
            self.rows = Without(rows, places) if self._is_token_file else list(Without(rows, places))
        if self._is_token_file and self._needs_few:
            few = random.Random(f"{seed}/{self.name}").sample(range(self.size), min(options.samples, self.size))
            self.rows, self.size = [self.rows[i] for i in sorted(few)], len(few)
            self._is_token_file = False

    def _encode(self, stage: Stage) -> Encode | None:
        """How rows of examples are made; a trainer of its own says nothing, but its model may see."""
        sight = sight_of(stage.model)
        if stage.encode is not None or sight is None:
            return stage.encode
        length = context(stage.model) or self.options.max_tokens
        return SeeingEncoder(self._tokenizer(stage), sight=sight, max_length=length).encode_all

    def _held(self, count: int) -> int:
        """How many of a fixed set of samples are held out."""
        return count // 11 if self.measured is None else min(self.measured, count // 5)

    @property
    def _needs_few(self) -> bool:
        """Whether a token file has too many rows: the user wants fewer, or the teacher must see each beforehand."""
        options = self.options
        cached = options.loss != "ce" and (options.loss == "margin" or options.teacher == "start")
        return cached or "samples" in options.model_fields_set

    def _tokenizer(self, stage: Stage) -> PreTrainedTokenizerBase:
        if stage.tokenizer is None:
            raise ConfigError(
                f"method {self.name}: rehearses texts, so the trainer needs processing_class, the tokenizer"
            )
        return stage.tokenizer


def _mean_nll(rehearsed: Rehearsed) -> Tensor:
    nll = prediction_nll(rehearsed.predictions(), rehearsed.labels)
    return nll.sum() / supervised_tokens(rehearsed.labels).clamp(min=1)
