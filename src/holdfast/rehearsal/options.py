"""The options of rehearsal: each key with its description, and beside it what it cannot be combined with."""

from __future__ import annotations

from copy import copy
from typing import Any, Literal, Self

from pydantic import Field, create_model, model_validator

from holdfast.config.section import Section
from holdfast.config.sizes import Size
from holdfast.losses import Divergence
from holdfast.rehearsal.memory import Policy

PAST = "past"
"""Prompts that are those of stored rows of past tasks."""


class RehearsalOptions(Section):
    """Any source of samples with any loss on them; combinations that make no sense are refused with the reason."""

    source: Literal["past", "general", "self", "current"] = Field(
        "past",
        description="past: stored samples of past tasks; general: general texts; self: samples of the model "
        "itself; current: the task's own rows",
    )
    loss: Literal["ce", "kl", "margin", "l1", "l2"] = Field(
        "ce",
        description="ce: next token; kl: to the teacher's distribution; margin, l1, l2: to its hidden states",
    )

    @model_validator(mode="after")
    def _loss_fits_the_source(self) -> Self:
        if self.source == "current" and self.loss == "ce":
            raise ValueError("source current with loss ce: the task's rows have their next-token loss already")
        if self.source == "current" and self.loss == "margin":
            raise ValueError(
                "source current with loss margin: the thresholds are those of a fixed set of samples; use l1, l2 or kl"
            )
        return self

    weight: float | Literal["dynamic"] = Field(
        1.0,
        description="weight of the loss; dynamic: makes it as large as the mean of the task's and the "
        "samples' CE in each micro-batch",
    )
    ce_weight: float = Field(0.0, ge=0, description="weight of next-token loss on the same samples, beside the loss")

    @model_validator(mode="after")
    def _weights_fit_the_loss(self) -> Self:
        if self.loss == "ce":
            self._refuse_unused("the loss is ce, which has a weight of its own", "ce_weight")
        if self.weight == "dynamic" and self.loss == "ce":
            raise ValueError("weight dynamic: the loss is ce itself")
        if not isinstance(self.weight, str) and self.weight < 0:
            raise ValueError(f"weight: must not be below 0, as {self.weight} is")
        return self

    way: Literal["beside", "replace"] = Field(
        "beside", description="samples come beside the batch, or replace a share of it"
    )
    ratio: float = Field(0.25, gt=0, le=100, description="samples per task row (beside), or share of rows (replace)")
    count: int | None = Field(None, ge=1, le=10_000, description="samples in every optimizer step, instead of a ratio")

    @model_validator(mode="after")
    def _share_of_a_batch(self) -> Self:
        if self.source == "current":
            self._refuse_unused("source current is the batch itself", "way", "ratio", "count")
        if self.way == "replace" and (self.loss != "ce" or self.weight != 1):
            raise ValueError("way replace: the samples join the task's own loss, so the loss must be ce with weight 1")
        if self.way == "replace" and self.count is None and self.ratio >= 1:
            raise ValueError(
                f"ratio: {self.ratio} would leave no row of the task in a batch; for way replace it is below 1"
            )
        if self.count is not None and "ratio" in self.model_fields_set:
            raise ValueError("count: give count (samples in a step) or ratio (samples per task row), not both")
        return self

    teacher: Literal["start", "previous"] = Field(
        "previous", description="start: the model before the first stage; previous: the model before this stage"
    )

    @model_validator(mode="after")
    def _teacher_knows_the_samples(self) -> Self:
        if self.loss == "ce":
            self._refuse_unused("the loss is ce, which has no teacher", "teacher")
        elif self.teacher == "start" and self.source in ("past", "current"):
            raise ValueError(
                f"teacher start with source {self.source}: these samples are not known before the first stage, so the "
                "model at the start cannot be asked about them; use teacher previous"
            )
        elif self.teacher == "start" and self.drawn:
            raise ValueError(
                "teacher start: samples are drawn from the model before the stage, which is their teacher, too; use "
                "teacher previous, or a path"
            )
        return self

    temperature: float = Field(1.0, gt=0, description="of teacher and student in the kl loss")
    temperature_squared: bool = Field(True, description="the kl loss times temperature^2 (Hinton et al., 2015)")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(teacher | student); reverse: KL(student | teacher)"
    )

    @model_validator(mode="after")
    def _only_kl_has_a_temperature(self) -> Self:
        if self.loss != "kl":
            reason = f"the loss is {self.loss}, not kl"
            self._refuse_unused(reason, "temperature", "temperature_squared", "direction")
        return self

    capacity: int = Field(1000, ge=1, description="past samples that the memory holds, over all tasks")
    policy: Policy = Field(
        "quota",
        description="quota: as many random samples of each past task; reservoir: each past row equally likely; as many "
        "of each past task, namely surprise: the least likely before it was learned, loss: the least learned, "
        "diversity: those that cover the others",
    )

    pictures: Size = Field(
        None,
        description="bytes of the pictures of the rows in memory at most, such as 2GB; rows beyond it are not kept, as "
        "the policy says; where absent, any number",
    )

    @model_validator(mode="after")
    def _only_past_samples_have_a_memory(self) -> Self:
        if not self.remembers:
            self._refuse_unused(f"source {self.source} has no memory", "capacity", "policy", "pictures")
        return self

    path: str | None = Field(
        None,
        description="general texts (.txt, .jsonl, .parquet, a folder) or a token file; or a corpus that the model "
        "wrote (`holdfast replay`), without which source self draws samples while training runs",
    )
    dataset: str | None = Field(None, description="a Hugging Face dataset of general texts, instead of a path")
    samples: int = Field(1000, ge=1, description="general samples at most; of a token file, where not given, all")
    max_tokens: int = Field(
        563,
        ge=2,
        description="tokens of a general text at most, within the context; of a row with pictures, data.max_length",
    )

    @model_validator(mode="after")
    def _texts_fit_the_source(self) -> Self:
        if self.source not in ("general", "self"):
            self._refuse_unused(f"source {self.source} reads no texts", "path")
        if self.source != "general":
            self._refuse_unused(f"source {self.source} is not general", "dataset", "samples", "max_tokens")
        elif (self.path is None) == (self.dataset is None):
            raise ValueError(
                "path: source general needs texts: give path (a file or folder) or dataset (of Hugging Face)"
            )
        return self

    prompts: str | None = Field(
        None,
        description="a file of rows whose prompts the model answers, instead of writing from nothing; past: those of "
        "stored rows of past tasks",
    )
    buffer: int = Field(8, ge=1, description="steps whose samples are drawn from the model together")
    length: int | None = Field(
        None,
        ge=2,
        description="tokens of a drawn sample, or of an answer to prompts; where absent, the model's context, at most "
        "1,024",
    )
    domain: str | list[str] | None = Field(
        None, description="domain whose token drawn samples begin with, or several in turn; else the begin token"
    )
    chat: bool | None = Field(
        None,
        description="draw the user's words and the answer in the chat template; where absent, if there is one and "
        "no domain is given",
    )

    @model_validator(mode="after")
    def _samples_can_be_drawn(self) -> Self:
        if not self.drawn:
            reason = "only source self without a path draws samples"
            self._refuse_unused(reason, "prompts", "buffer", "length", "domain", "chat")
        elif self.loss == "margin":
            raise ValueError(
                "loss margin: its thresholds are those of a fixed set of samples; write one with `holdfast replay` and "
                "give it as path"
            )
        if self.prompts is not None:
            self._refuse_unused("the model answers given prompts", "domain", "chat")
        if self.domain is not None and not self.domain:
            raise ValueError("domain: names none; leave it out, and samples begin with the begin token")
        if self.chat and self.domain is not None:
            raise ValueError("chat: a chat begins as its template does, so it takes no domain")
        return self

    layer: int = Field(-1, description="hidden state of margin, l1 and l2; -1: the last, after the final norm")
    places: bool = Field(False, description="margin, l1 and l2 count the places of pictures, too, not text alone")
    multiple: float = Field(1.0, gt=0, description="thresholds of the margin loss: mean +- multiple * std")
    reduction: Literal["nonzero", "mean"] = Field(
        "nonzero", description="margin loss: mean over the entries that violate (as published), or over all"
    )

    @model_validator(mode="after")
    def _loss_compares_hidden_states(self) -> Self:
        if self.loss in ("ce", "kl"):
            self._refuse_unused(f"the {self.loss} loss takes no hidden layer", "layer", "places")
        if self.loss != "margin":
            self._refuse_unused(f"the loss is {self.loss}", "multiple", "reduction")
        return self

    @property
    def drawn(self) -> bool:
        """Whether the samples are drawn from the model while training runs."""
        return self.source == "self" and self.path is None

    @property
    def remembers(self) -> bool:
        """Whether rows of past tasks are stored."""
        return self.source == "past" or (self.source == "self" and self.prompts == PAST)

    @property
    def violations_only(self) -> bool:
        """Whether the loss is a mean over those entries alone that violate."""
        return self.loss == "margin" and self.reduction == "nonzero"

    @property
    def compared_layer(self) -> int:
        """The hidden state in which student and teacher are compared; for kl the one that the head is applied to."""
        return -1 if self.loss == "kl" else self.layer

    @property
    def divergence(self) -> Divergence:
        """What the kl loss computes."""
        return Divergence(self.temperature, self.direction, self.temperature_squared)

    def _refuse_unused(self, reason: str, *keys: str) -> None:
        """ValueError if the user gave one of these keys, which would change nothing."""
        for key in keys:
            if key in self.model_fields_set:
                raise ValueError(f"{key}: would change nothing, since {reason}")


def preset(**defaults: Any) -> type[RehearsalOptions]:
    """Rehearsal's options with other defaults."""
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        field = copy(RehearsalOptions.model_fields[name])
        field.default = default
        fields[name] = (field.annotation, field)
    return create_model("Options", __base__=RehearsalOptions, **fields)
