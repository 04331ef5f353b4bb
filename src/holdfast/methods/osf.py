"""OSF: a stage trains outside the dominant singular directions of the weights that it begins with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.pieces import full
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.models.head import base, hidden_only
from holdfast.models.seq2seq import decoder_depth, reads_apart
from holdfast.system.shapes import of_shape


@dataclass
class Preserved:
    """The part of one matrix [out, in] that a stage does not change.

    Attributes:
        left, right: orthonormal bases of its output and input directions, [out, rank] and [in, rank], float32.
        u, s, v: its singular triplets inside the adapter, which are the adapter's first, [out, n], [n] and [n, in].
    """

    left: Tensor
    right: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @torch.no_grad()
    def project_(self, u: Tensor, v: Tensor) -> None:
        """Remove the preserved directions from factors, or from their gradients, [out, r] and [r, in], in place."""
        u.sub_((self.left @ (self.left.T @ u.float())).to(u.dtype))
        v.sub_(((v.float() @ self.right) @ self.right.T).to(v.dtype))


@dataclass
class Dominant:
    """The dominant singular triplets of a whole matrix [..., out, in], as a stage begins with it, float32.

    Attributes:
        u, s, v: [..., out, k], [..., k] and [..., in, k].
    """

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, matrix: Tensor, share: float) -> Dominant:
        """The triplets of this share of the matrix's singular directions."""
        u, s, vt = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
        count = min(s.shape[-1], max(0, round(share * s.shape[-1])))
        return cls(u[..., :count].clone(), s[..., :count].clone(), vt[..., :count, :].mT.clone())

    def leaves_something_free(self, both: bool) -> bool:
        """Whether a projection leaves any change of the matrix."""
        out, into, count = self.u.shape[-2], self.v.shape[-2], self.s.shape[-1]
        return count < (min(out, into) if both else max(out, into))

    @torch.no_grad()
    def remove_block_(self, gradient: Tensor) -> None:
        """Remove what leads from dominant input directions to dominant output directions, in place."""
        block = self.u.mT @ gradient.float() @ self.v
        gradient.sub_((self.u @ block @ self.v.mT).to(gradient.dtype))

    @torch.no_grad()
    def remove_both_(self, gradient: Tensor) -> None:
        """Remove dominant output directions and dominant input directions, in place."""
        gradient.sub_((self.u @ (self.u.mT @ gradient.float())).to(gradient.dtype))
        gradient.sub_(((gradient.float() @ self.v) @ self.v.mT).to(gradient.dtype))

    @torch.no_grad()
    def restore_block_(self, matrix: Tensor) -> None:
        """Give back u^T matrix v its value of the stage's beginning, diag(s), in place."""
        block = self.u.mT @ matrix.float() @ self.v - self.s.diag_embed()
        matrix.sub_((self.u @ block @ self.v.mT).to(matrix.dtype))

    @torch.no_grad()
    def restore_both_(self, matrix: Tensor) -> None:
        """Give back u^T matrix = diag(s) v^T and matrix v = u diag(s), in place."""
        s = self.s[..., None, :]
        matrix.sub_((self.u @ (self.u.mT @ matrix.float() - (self.v * s).mT)).to(matrix.dtype))
        matrix.sub_(((matrix.float() @ self.v - self.u * s) @ self.v.mT).to(matrix.dtype))


class OSF(Method):
    """Orthogonal subspace fine-tuning (Nayak et al., 2025, arXiv 2504.07097), a new decomposition before each stage.

    W = U_high S_high V_high^T + the rest, where the first part holds the dominant singular triplets of W at the start
    of the stage. Gradients are projected, and so are the weights after each step, since Adam's step leaves the span of
    its gradients:

        block: grad W <- grad W - U_high U_high^T grad W V_high V_high^T (the paper's equation; tuner full)
        both: nothing of U_high on the left nor of V_high on the right is changed (the authors' and PEFT's code)

    With the tuner osf, the rest is U S V^T, whose factors are trained. Preserved are the directions that this tuner
    never trains, and the strongest directions up to this share of all directions of the matrix:

        r = minimum + I (target - minimum)

    I is the cosine similarity of the layer's input and output on the last task, divided by its mean over all layers.
    """

    name = "osf"
    turn = 1
    tuners: ClassVar[tuple[str, ...]] = ("full", "osf")
    tuners_reason = "it projects whole matrices, or sets which directions of tuner osf are trained"
    not_with: ClassVar = dict.fromkeys(
        ("ewc", "si", "mas", "ogd"),
        "it remembers something of every trained weight, and osf takes other factors for them after each stage",
    ) | {"cia": "an average of singular vectors is none, so that osf would preserve other than the dominant directions"}

    class Options(Section):
        project: Literal["both", "block"] | None = Field(
            None,
            description="block: what leads from dominant input to dominant output directions stays; both: what begins "
            "at the former or ends at the latter; where absent, block with tuner full and both with tuner osf",
        )
        minimum: float = Field(0.1, ge=0, le=1, description="mrr: share preserved where a layer has no importance")
        target: float = Field(0.8, ge=0, le=1, description="trr: share of singular directions preserved on average")
        growth: float = Field(0.0, ge=0, description="added to target after each stage")
        samples: int = Field(128, ge=1, description="train rows of a task on which importance is measured")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.importance: list[float] = []  # of each layer, 1 on average; empty before the first stage's end
        self.preserved: dict[str, Preserved] = {}  # by the name of the factors
        self.dominant: dict[str, Dominant] = {}  # of whole matrices, by their names
        self.held: dict[str, Tensor] = {}  # other trained weights, which stay as they are, beside whole matrices
        if self.options.project == "block":
            self.tuners = ("full",)  # type: ignore[misc]
            self.tuners_reason = "project is block, which takes whole matrices"  # type: ignore[misc]

    def before_stage(self, stage: Stage) -> None:
        self.preserved, self.dominant, self.held = {}, {}, {}
        self._begin_factors(stage)
        if not self.preserved:
            self._begin_matrices(stage)

    def _share(self, name: str, stage: Stage) -> float:
        """The share of singular directions of a matrix that a stage preserves."""
        target = min(1.0, self.options.target + self.options.growth * (stage.index - 1))
        return self.options.minimum + self._importance(name, stage.model) * (target - self.options.minimum)

    def _begin_matrices(self, stage: Stage) -> None:
        """Find the dominant triplets of the decoder layers' matrices, and hold all else."""
        trained = weights(stage.model).whole().tensors
        whole = {} if hasattr(stage.model, "peft_config") else trained
        matrices = {name: t for name, t in whole.items() if t.dim() >= 2 and re.search(r"\.\d+\.", name)}
        for name, t in matrices.items():
            dominant = Dominant.of(t, self._share(name, stage))
            if dominant.leaves_something_free(self.options.project == "both"):
                self.dominant[name] = dominant
        if not matrices:
            raise ConfigError(
                "method osf: needs a model whose matrices are trained whole, or with PEFT's OSF adapter, as "
                "peft.get_peft_model(model, peft.OSFConfig(...)) makes it"
            )
        self.held = {name: t.detach().clone() for name, t in trained.items() if name not in self.dominant}

    def _begin_factors(self, stage: Stage) -> None:
        """Decide which of the factors of PEFT's adapter are preserved."""
        for name, layer, adapter in osf_layers(stage.model):
            factors = layer.osf_svd_params[adapter]
            u, s, v = (full(factors[key]).detach() for key in ("U_low", "S_low", "V_low"))
            share = self._share(name, stage)
            left, right = fixed_directions(layer, adapter)
            fixed = torch.linalg.svdvals(left.T @ full(layer.get_base_layer().weight).float() @ right)
            order = torch.cat([fixed, s.float()]).argsort(descending=True)
            count = int((order[: max(0, round(share * len(order)))] >= len(fixed)).sum())
            self.preserved[name] = Preserved(
                orthonormal(torch.cat([left, u[:, :count].float()], dim=1)),
                orthonormal(torch.cat([right, v[:count].T.float()], dim=1)),
                *(part.clone() for part in (u[:, :count], s[:count], v[:count])),
            )
        if self.preserved and self.options.project == "block":
            raise ConfigError("method osf: project block takes whole matrices, and the model has PEFT's OSF adapter")

    def _importance(self, name: str, model: nn.Module) -> float:
        """The importance of the layer whose number is in a parameter's name; 1 if there is none."""
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number[1]) if number is not None else len(self.importance)
        if reads_apart(model) and re.search(r"(^|\.)encoder\.", name):
            layer += decoder_depth(base(model).config)
        return self.importance[layer] if layer < len(self.importance) else 1.0

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        whole = gradients.whole()
        for name, fixed in self.preserved.items():
            u, s, v = (whole.tensors[f"{name}.{key}"] for key in ("U_low", "S_low", "V_low"))
            fixed.project_(u, v)
            count = len(fixed.s)
            for part in (u[:, :count], s[:count], v[:count]):
                part.zero_()
        for name, dominant in self.dominant.items():
            remove = dominant.remove_both_ if self.options.project == "both" else dominant.remove_block_
            remove(whole.tensors[name])
        for name in self.held:
            whole.tensors[name].zero_()
        if gradients.pieces:
            gradients.load_(whole.tensors)
        return {}

    def after_step(self, step: Step, weights: Shards) -> None:
        whole = weights.whole()
        for name, fixed in self.preserved.items():
            u, s, v = (whole.tensors[f"{name}.{key}"] for key in ("U_low", "S_low", "V_low"))
            fixed.project_(u, v)
            count = len(fixed.s)
            u[:, :count], s[:count], v[:count] = fixed.u, fixed.s, fixed.v
        for name, dominant in self.dominant.items():
            restore = dominant.restore_both_ if self.options.project == "both" else dominant.restore_block_
            restore(whole.tensors[name])
        for name, held in self.held.items():
            whole.tensors[name].copy_(held)
        if weights.pieces:
            weights.load_(whole.tensors)

    @torch.no_grad()
    def final_weights(self, stage: Stage) -> None:
        """Make the factors singular triplets again, the strongest first, without changing their product.

        The sign of a triplet is the one with which U's largest entry is positive.
        """
        self.dominant, self.held = {}, {}
        if not self.preserved:
            return
        trained = weights(stage.model)
        whole = trained.whole()
        for name, _, _ in osf_layers(stage.model):
            factors = {key: whole.tensors[f"{name}.{key}"] for key in ("U_low", "S_low", "V_low")}
            left, left_r = torch.linalg.qr(factors["U_low"].float())
            right, right_r = torch.linalg.qr(factors["V_low"].T.float())
            a, s, b = torch.linalg.svd((left_r * factors["S_low"].float()) @ right_r.T)
            u, v = left @ a, b @ right.T
            sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
            for key, value in (("U_low", u * sign), ("S_low", s), ("V_low", v * sign.T)):
                factors[key].copy_(value)
        if trained.pieces:
            trained.load_(whole.tensors)

    @property
    def needs_rows(self) -> bool:
        return True

    def after_stage(self, stage: Stage) -> None:
        rows = stage.sample(self.options.samples, stage.random(self.name))
        similarity = layer_similarity(stage, rows).clamp(min=0)
        mean = float(similarity.mean())
        self.importance = (similarity / mean).tolist() if mean else [1.0] * len(similarity)

    def state(self) -> State:
        return {"importance": self.importance}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.importance = of_shape(list[float], state["importance"], "importance")


def osf_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """The name of the trained factors, the layer and the adapter's name, of each matrix that PEFT's OSF adapts."""
    from peft.tuners.osf import OSFLayer

    for name, layer in model.named_modules():
        if isinstance(layer, OSFLayer):
            for adapter in layer.active_adapters:
                if adapter in layer.osf_svd_params and full(layer.osf_svd_params[adapter]["S_low"]).numel():
                    yield f"{name}.osf_svd_params.{adapter}", layer, adapter


def fixed_directions(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Output and input directions of the part that the adapter never trains, [out, rank] and [in, rank], float32.

    PEFT stores them unless they and the trained ones span the whole space.
    """
    if adapter in layer._osf_U_high:
        left = layer._osf_U_high[adapter].float()
    else:
        left = complement(layer._osf_U_low_init[adapter].float())
    if adapter in layer._osf_V_high:
        return left, layer._osf_V_high[adapter].T.float()
    return left, complement(layer._osf_V_low_init[adapter].T.float())


def complement(columns: Tensor) -> Tensor:
    """An orthonormal basis of the orthogonal complement of linearly independent columns."""
    return torch.linalg.qr(columns, mode="complete").Q[:, columns.shape[1] :]


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of linearly independent columns."""
    return torch.linalg.qr(columns).Q


def layer_similarity(stage: Stage, rows: Sequence[TokenRow]) -> Tensor:
    """Cosine similarity of each layer's input and output, averaged over tokens and then rows, [layers].

    Of a sequence-to-sequence model, the decoder's layers come before the encoder's.
    """
    model = stage.model
    training = model.training
    model.eval()
    total: Any = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), stage.micro_batch_size):
            batch = stage.collate(rows[start : start + stage.micro_batch_size])
            batch.pop("labels")
            outputs = model(**batch, output_hidden_states=True, **hidden_only(model))
            found = [_similarity(outputs.hidden_states, batch["attention_mask"])]
            if "encoder_mask" in batch:
                found.append(_similarity(outputs.encoder_hidden_states, batch["encoder_mask"]))
            total = total + torch.cat(found)
    model.train(training)
    return (total / len(rows)).cpu().double()


def _similarity(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The cosine similarity of neighbouring states, averaged over tokens, and summed over rows, [layers].

    Args:
        states: of each layer, [rows, seq, hidden].
        mask: [rows, seq], 1 where there is a token.
    """
    layers = [nn.functional.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairwise(states)]
    return ((torch.stack(layers) * mask).sum(dim=2) / mask.sum(dim=1)).sum(dim=1)
