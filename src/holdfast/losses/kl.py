"""Losses between a student's and a teacher's logits: KL divergence, plain and chunked, and DER's squared distance.

KL with a temperature is distillation (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531) and LwF (Li and Hoiem, 2016,
arXiv 1606.09282); the factor T² keeps the size of the gradient as T grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import ConfigError, did_you_mean
from holdfast.losses.chunked import CHUNK_SIZE, Head, chunked_loss, chunked_loss_of_logits
from holdfast.losses.common import unmasked, wide

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Divergence:
    """Which KL divergence is taken of a teacher's and a student's logits.

    Attributes:
        temperature: T > 0; the softmax is taken of logits / T.
        direction: "forward" KL(teacher ‖ student) or "reverse" KL(student ‖ teacher).
        temperature_squared: whether the divergence is multiplied by T².

    Raises:
        ConfigError: the temperature is not above 0, or the direction is unknown.
    """

    temperature: float = 1.0
    direction: Direction = "forward"
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature: {self.temperature} cannot divide logits; it must be above 0")
        if self.direction not in get_args(Direction):
            near = did_you_mean(self.direction, get_args(Direction))
            raise ConfigError(f"direction: {self.direction!r} is unknown{near}")

    @property
    def factor(self) -> float:
        """T², or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def log_softmax(self, logits: Tensor) -> Tensor:
        """log softmax(logits / T) over the last dimension."""
        return F.log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)


FORWARD_KL = Divergence()


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, divergence: Divergence = FORWARD_KL
) -> tuple[Tensor, Tensor]:
    """Sum over the positions of KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), and the number of positions.

    forward: p is the teacher's softmax(logits / T), q the student's; reverse: the other way round.

    Args:
        student_logits: [batch, seq, vocab], any floating type; the softmax is computed in float32 or wider.
        teacher_logits: the same shape; it gets no gradient.
        mask: [batch, seq], not zero where a position counts; None counts all.
        divergence: temperature, direction and factor.

    Returns:
        (sum in nats, a scalar with gradient, float32 or wider; number of positions, an int64 scalar).

    Raises:
        ConfigError: the vocabularies differ.
    """
    _check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    assert student_logits.shape == teacher_logits.shape, (student_logits.shape, teacher_logits.shape)
    log_student = divergence.log_softmax(wide(unmasked(student_logits, mask)))
    log_teacher = divergence.log_softmax(wide(unmasked(teacher_logits.detach(), mask)))
    forward = divergence.direction == "forward"
    log_p, log_q = (log_teacher, log_student) if forward else (log_student, log_teacher)
    return (log_p.exp() * (log_p - log_q)).sum() * divergence.factor, _count(log_student)


def chunked_kl(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    mask: Tensor | None,
    divergence: Divergence = FORWARD_KL,
    *,
    student_logits: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """:func:`kl_divergence` of two heads' logits, of which at most ``chunk_size`` tokens are held at a time.

    Value and gradient are those of the plain function on the logits of :class:`Head`. The teacher needs no logits,
    only its last hidden state and its head. Matrix products run in the heads' data type, or in autocast's; softmax,
    divergence and the head's gradient are accumulated in float32 or wider. Masked positions cost nothing.

    Args:
        student_hidden: [batch, seq, hidden], after the final norm.
        student_head: the head of [vocab, hidden] that is applied to it.
        teacher_hidden: [batch, seq, teacher's hidden].
        teacher_head: the teacher's head, of the same vocabulary. Neither gets a gradient.
        mask: [batch, seq], not zero where a position counts; None counts all.
        divergence: temperature, direction and factor.
        student_logits: [batch, seq, vocab], the student's logits where they have been computed already. They are then
            not computed again, and the gradient goes to them instead of the hidden states and the head.
        chunk_size: tokens whose logits are held at a time.

    Returns:
        (sum in nats, a scalar with gradient to student_hidden and the weight and bias of student_head where they
        require it; number of positions, an int64 scalar). It cannot be differentiated twice.

    Raises:
        ConfigError: the vocabularies differ, or chunk_size is below 1.
    """
    _check_vocabularies(len(student_head.weight), len(teacher_head.weight))
    assert student_hidden.shape[:-1] == teacher_hidden.shape[:-1], (student_hidden.shape, teacher_hidden.shape)
    student, teacher = student_head.cast(), teacher_head.detached().cast()
    if teacher_head.weight is student_head.weight:  # as with LoRA: both share one copy in autocast's type
        teacher = teacher._replace(weight=student.weight.detach())
    teacher_tokens = unmasked(teacher_hidden.detach(), mask)

    def loss(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_teacher = divergence.log_softmax(teacher.logits(teacher_tokens[chunk]))
        log_student = divergence.log_softmax(logits)
        kl = _forward_kl if divergence.direction == "forward" else _reverse_kl
        total, gradient = kl(log_teacher, log_student)
        return total * divergence.factor, gradient.mul_(divergence.factor / divergence.temperature)

    if student_logits is not None:
        logits = unmasked(student_logits, mask)
        return chunked_loss_of_logits(logits, loss, chunk_size), _count(logits)
    tokens = unmasked(student_hidden, mask)
    return chunked_loss(tokens, student, loss, chunk_size), _count(tokens)


def logit_mse(student_logits: Tensor, stored_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dark experience replay's loss (Buzzega et al., 2020, arXiv 2004.07211): E ‖z − h_θ(x)‖²₂.

    z are the logits that were stored with a sample, and h_θ(x) those of the student. The squared distance is summed
    over the vocabulary and averaged over the positions. The published code averages over the vocabulary, too, so its
    weight is this one's times the size of the vocabulary.

    Args:
        student_logits: [batch, seq, vocab], any floating type; computed in float32 or wider.
        stored_logits: the same shape; it gets no gradient.
        mask: [batch, seq], not zero where a position counts (for a position that predicts a supervised token); None
            counts all.

    Returns:
        A scalar with gradient, float32 or wider; 0 if no position counts.
    """
    assert student_logits.shape == stored_logits.shape, (student_logits.shape, stored_logits.shape)
    distance = wide(unmasked(student_logits, mask)) - wide(unmasked(stored_logits.detach(), mask))
    return distance.square().sum() / max(len(distance), 1)


def _forward_kl(log_teacher: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and its gradient q − p to the student's logits; both arguments are overwritten."""
    p = log_teacher.exp()
    total = log_teacher.sub_(log_student).mul_(p).sum()
    return total, log_student.exp_().sub_(p)


def _reverse_kl(log_teacher: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) and its gradient q (log q − log p − KL) to the student's logits; both arguments are overwritten."""
    gap = torch.sub(log_student, log_teacher, out=log_teacher)
    q = log_student.exp_()
    divergence = (q * gap).sum(-1, keepdim=True)
    return divergence.sum(), gap.sub_(divergence).mul_(q)


def _count(positions: Tensor) -> Tensor:
    return torch.tensor(len(positions), device=positions.device)


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise ConfigError(
            f"teacher: it has a vocabulary of {teacher}, the student one of {student}; "
            "KL compares them token by token, so both need the same vocabulary"
        )
