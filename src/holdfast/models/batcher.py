"""Sequences that many callers ask for at any time, generated in batches that take turns token by token."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from holdfast.models.seq2seq import beginning, prompted
from holdfast.models.sight import never_written

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOWEST_TEMPERATURE = 1e-4  # below it, the likeliest token is taken: float32 could not tell the difference


class TokenLogprob(NamedTuple):
    """A token, its log-probability, and the likeliest tokens in its place with theirs, the likeliest first.

    The log-probabilities are the model's own, in nats, whatever the token was chosen by; None where not asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0: the likeliest token.
        top_p: sample from the likeliest tokens that have this much probability together.
        presence_penalty: taken from the logit of each token that was generated before.
        frequency_penalty: taken from the logit of each token, once for each time that it was generated.
        logit_bias: added to the logits of tokens.
        seed: of the random choices; None: another one each time.
        logprobs: the number of likeliest tokens to report with each token; None: no log-probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen by other logits than the model's."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


class Job:
    """A sequence to generate.

    Args:
        prompt: token ids, at least one.
        max_tokens: tokens to generate, at most; at least 1.
        take: called with each token as soon as it is chosen; it returns whether the sequence ends with it.
        end: called once, with None when the sequence is complete or cancelled, otherwise with what went wrong.
        owner: whoever asked; jobs of one owner share what they may take.
        held: what must stay in memory until the sequence has ended, such as the pictures of its prompt.

    ``take`` and ``end`` are called in a thread of the batcher, one call at a time.
    """

    def __init__(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        take: Callable[[TokenLogprob], bool],
        end: Callable[[BaseException | None], None],
        owner: object,
        held: object = None,
    ):
        self.prompt, self.max_tokens, self.sampling = prompt, max_tokens, sampling
        self.take, self.end, self.owner, self.held = take, end, owner, held
        self.cancelled = False
        self.ended = False
        self.counts: Counter[int] = Counter()
        self.random: torch.Generator | None = None
        if sampling.temperature >= LOWEST_TEMPERATURE:
            self.random = torch.Generator()
            self.random.seed() if sampling.seed is None else self.random.manual_seed(sampling.seed)

    def cancel(self) -> None:
        """Stop before the next token; any thread may ask for it."""
        self.cancelled = True

    def choose(self, logits: Tensor, likeliest: int) -> TokenLogprob:
        """Choose the next token by its logits, float32 [vocab]; ``likeliest`` is the one with the highest."""
        chosen, sampling = likeliest, self.sampling
        if self.random is not None or sampling.changes_logits:
            chosen = self._sample(logits)
        self.counts[chosen] += 1
        if sampling.logprobs is None:
            return TokenLogprob(chosen)
        return with_logprobs(logits[None].log_softmax(-1), [chosen], sampling.logprobs)[0]

    def _sample(self, logits: Tensor) -> int:
        sampling = self.sampling
        logits = logits.detach().cpu().clone()
        if sampling.logit_bias:
            logits[list(sampling.logit_bias)] += torch.tensor([*sampling.logit_bias.values()], dtype=logits.dtype)
        if self.counts and (sampling.presence_penalty or sampling.frequency_penalty):
            times = torch.tensor([*self.counts.values()], dtype=logits.dtype)
            logits[list(self.counts)] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if self.random is None:
            return int(logits.argmax())
        probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # the likeliest one always stays
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < sampling.top_p))
        return int(torch.multinomial(probabilities, 1, generator=self.random))


def with_logprobs(logprobs: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Tokens with their log-probabilities, and the ``top`` likeliest in the place of each.

    Args:
        logprobs: float32 [tokens, vocab].
    """
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].tolist()
    values, indices = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    each = zip(ids, chosen, values, indices, strict=True)
    return [TokenLogprob(token, own, tuple(zip(i, v, strict=True))) for token, own, v, i in each]


class Turns:
    """A lock that goes to whoever has waited longest."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets = self._now = 0

    def __enter__(self) -> None:
        with self._condition:
            mine = self._tickets
            self._tickets += 1
            self._condition.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._now += 1
            self._condition.notify_all()

    def pass_on(self) -> None:
        """Let all who wait now go first."""
        self.__exit__()
        self.__enter__()


class Batcher:
    """Generates sequences with one model for many callers.

    Sequences that wait at the same time become a batch, which transformers' ``generate`` continues, so that a sequence
    is what :func:`holdfast.models.generation.generate` gives, with any tuner. Each batch runs in a thread. The batches
    take turns after every token: a sequence that arrives begins at once, however long the others are.

    Args:
        model: a language model in eval mode, with or without adapters.
        batch_size: sequences of a batch, and sequences of one owner under way, at most.
        batch_tokens: tokens of a batch with its padding, at most, where it has more than one sequence.
        concurrency: sequences under way at once; further ones wait in order.
        pad_token_id: fills short prompts; it is masked.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        batch_size: int,
        batch_tokens: int,
        concurrency: int,
        pad_token_id: int,
    ):
        self._model, self._pad = model, pad_token_id
        self._batch_size, self._batch_tokens, self._concurrency = batch_size, batch_tokens, concurrency
        self._turns, self._lock = Turns(), threading.Lock()
        self._waiting: deque[Job] = deque()
        self._running: Counter[object] = Counter()

    @property
    def busy(self) -> int:
        """Sequences that are under way or wait."""
        with self._lock:
            return len(self._waiting) + self._running.total()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Generate sequences; returns at once."""
        with self._lock:
            self._waiting.extend(jobs)
        self._start()

    def logprobs(
        self, prompts: Sequence[list[int]], top: int, cancelled: Callable[[], bool] = lambda: False
    ) -> list[list[TokenLogprob]]:
        """The log-probability of each token of each prompt, given those before it; the first has none.

        Args:
            top: how many of the likeliest tokens are reported with each token.
            cancelled: asked before each batch; the rest is left out where it says so.
        """
        found: list[list[TokenLogprob]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order and not cancelled():
            width = len(prompts[order[0]])
            size = max(1, min(self._batch_size, self._batch_tokens // width))
            batch, order = order[:size], order[size:]
            rows = [prompts[i] + [self._pad] * (width - len(prompts[i])) for i in batch]
            mask = [[1] * len(prompts[i]) + [0] * (width - len(prompts[i])) for i in batch]
            with self._turns, torch.inference_mode():
                ids, attention = (torch.tensor(values, device=self._model.device) for values in (rows, mask))
                logits = self._model(input_ids=ids, attention_mask=attention, use_cache=False).logits
                for i, row in zip(batch, logits, strict=True):
                    tokens = prompts[i]
                    known = row[: len(tokens) - 1].float().log_softmax(-1)  # [tokens - 1, vocab]
                    found[i] = [TokenLogprob(tokens[0]), *with_logprobs(known, tokens[1:], top)]
        return found

    def _start(self) -> None:
        threading.Thread(target=self._work, name="holdfast batch", daemon=True).start()

    def _work(self) -> None:
        """Generate what waits, a batch at a time, until nothing may begin."""
        while True:
            with self._turns:  # whoever arrives before its turn comes belongs to the batch
                batch = self._begin()
                if not batch:
                    return
                self._generate(batch)

    def _begin(self) -> list[Job]:
        """Take the jobs of a batch from those that wait, in order."""
        batch: list[Job] = []
        gone: list[Job] = []
        with self._lock:
            left: deque[Job] = deque()
            width = 0
            for job in self._waiting:
                wider = max(width, len(job.prompt) + job.max_tokens)
                if job.cancelled:
                    gone.append(job)
                elif (
                    len(batch) >= self._batch_size
                    or self._running.total() >= self._concurrency
                    or self._running[job.owner] >= self._batch_size
                    or (batch and (len(batch) + 1) * wider > self._batch_tokens)
                ):
                    left.append(job)
                else:
                    batch.append(job)
                    self._running[job.owner] += 1
                    width = wider
            self._waiting = left
        for job in gone:
            job.ended = True
            job.end(None)
        return batch

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """End a job that is under way; its place is free for one that waits."""
        if job.ended:
            return
        job.ended = True
        with self._lock:
            self._running[job.owner] -= 1
            self._running += Counter()  # forgets owners without jobs
            waits = bool(self._waiting)
        job.end(error)
        if waits:
            self._start()

    def _generate(self, batch: list[Job]) -> None:
        config = GenerationConfig(
            max_new_tokens=max(job.max_tokens for job in batch),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=self._pad,
            **beginning(self._model),
            **never_written(self._model),
        )
        steps = _Steps(self, batch)
        try:
            with torch.inference_mode():
                self._model.generate(
                    **prompted(self._model, [job.prompt for job in batch], self._pad).inputs,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_Choice(steps)]),
                    stopping_criteria=StoppingCriteriaList([_End(steps)]),
                )
        except Exception as error:  # whoever waits for an answer is told
            for job in batch:
                self._end(job, error)
        for job in batch:
            self._end(job)


class _Steps:
    """The steps of a batch."""

    def __init__(self, batcher: Batcher, batch: list[Job]):
        self.batcher, self.batch = batcher, batch

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [rows, vocab] of which each row's chosen token has the highest."""
        best, likeliest = (part.tolist() for part in scores.max(-1))
        chosen = [self._token(*row) for row in zip(self.batch, scores, best, likeliest, strict=True)]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)

    def _token(self, job: Job, logits: Tensor, best: float, likeliest: int) -> int:
        if job.cancelled:
            self.batcher._end(job)
        if job.ended:
            return self.batcher._pad
        try:
            if not isfinite(best):
                raise FloatingPointError("the model's logits are not finite")
            token = job.choose(logits, likeliest)
            if job.take(token) or job.counts.total() >= job.max_tokens:
                self.batcher._end(job)
            return token.id
        except Exception as error:  # one sequence fails, and the others go on
            self.batcher._end(job, error)
            return self.batcher._pad

    def ended(self) -> list[bool]:
        """Which rows have ended; where some have not, other batches go first."""
        if not all(job.ended for job in self.batch):
            self.batcher._turns.pass_on()
            for job in self.batch:
                if job.cancelled:
                    self.batcher._end(job)
        return [job.ended for job in self.batch]


class _Choice(LogitsProcessor):
    def __init__(self, steps: _Steps):
        self.steps = steps

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.steps.choose(scores)


class _End(StoppingCriteria):
    def __init__(self, steps: _Steps):
        self.steps = steps

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.tensor(self.steps.ended(), device=input_ids.device)
