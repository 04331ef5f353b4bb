"""GainLoRA: InfLoRA whose branches are weighed by gates; the newest gate is closed for the prompts of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import State
from holdfast.api.rows import TokenRow, prompt
from holdfast.api.stage import Stage, Step
from holdfast.engines.pieces import full
from holdfast.engines.saved import saved_tensor
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.inflora import InfLoRA, adapted
from holdfast.methods.parts.gates import (
    LAYERS,
    RECOMPUTED,
    Gate,
    GateWeights,
    Gating,
    coefficients,
    features,
    pooled_prompts,
    random_gate,
)
from holdfast.methods.parts.input_space import InputSpace, spaces_from_state, spaces_state
from holdfast.methods.parts.stacked_lora import EXCHANGES, NOT_WITH, PAST
from holdfast.models.head import base
from holdfast.system.device import to_float64
from holdfast.tuners.lora_factors import TRAINED
from holdfast.tuners.prompt_keys import row_fingerprint

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation

GATE = "gain_lora_gate"
"""The name of the new gate within the model, while it is trained."""


class GainLoRA(InfLoRA):
    """Gated integration of low-rank adaptation (Liang, Chen and Li, 2025, arXiv 2505.15424), with InfLoRA's branches.

    W x + s sum_i a_i B_i A_i x,  a_i = g_i(prompt) = |2 sigmoid(4 cos(G_3, p_2)) - 1|,  p_l = SiLU(G_l p_(l-1))

    p_0 is the mean embedding of the prompt's tokens. Each stage trains a branch and a gate of its own; earlier ones
    stay. A new gate begins with the last one's G_1 and G_2, and a G_3 that is orthogonal to M_3; all its updates are
    orthogonal to M_l, the span of what layer l received on the prompts of earlier tasks. So the gate stays closed,
    a_t = 0, for these prompts, and open to others.
    """

    name = "gain_lora"
    text_only = "its gates read the prompt from the embeddings of text"
    not_with = {"o_lora": EXCHANGES, "n_lora": EXCHANGES, "inflora": EXCHANGES} | NOT_WITH
    causal_only = "its gates read the prompt in the one sequence that a causal model reads"
    no_checkpointing = RECOMPUTED
    lacks = (
        "weighs the branch of each stage by a gate that reads the prompt: here all branches count fully, whatever the "
        "prompt, which is not what was trained"
    )

    class Options(InfLoRA.Options):
        gate_threshold: float = Field(
            0.995, gt=0, le=1, description="the share of the gate's inputs on past prompts that its updates leave alone"
        )
        gate_width: int = Field(100, ge=1, description="units of a gate's hidden layer")

    options: Options

    @property
    def needs_token_batches(self) -> bool:
        return True

    @property
    def needs_rows_apart(self) -> bool:
        return True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gates: list[GateWeights] = []  # of finished stages, on the CPU
        self.gate_spaces: dict[str, InputSpace] = {}  # M_l, by the names of LAYERS
        self.start: GateWeights = {}  # the new gate as its stage began
        self.gating = Gating()

    def before_stage(self, stage: Stage) -> None:
        model = stage.model
        self.gating.lengths |= {row_fingerprint(row["input_ids"]): len(prompt(row)) for row in stage.rows}
        self._attach(model)
        super().before_stage(stage)
        pooled = self._pooled(stage)
        self.start = {name: w.to(pooled.device) for name, w in self._new_gate(stage, pooled).items()}
        for name, space in self.gate_spaces.items():
            self.gate_spaces[name] = replace(space, basis=space.basis.to(pooled.device))
        gate = Gate(self.start)
        model.add_module(GATE, gate)
        self._attach(model, gate)

    def _new_gate(self, stage: Stage, pooled: Tensor) -> GateWeights:
        """The gate as the stage begins with it."""
        drawn = random_gate(pooled.shape[1], self.options.gate_width, stage.random(f"{self.name}/gate"))
        new = self.gates[-1] | {"last": drawn["last"]} if self.gates else drawn
        key = features({name: w.to(pooled) for name, w in new.items()}, pooled)["last"]
        key = to_float64(key)
        space = self.gate_spaces.get("last", InputSpace.empty(key.shape[1]))
        if not space.free_directions:
            raise ConfigError(
                f"method {self.name}: the prompts of earlier tasks fill every input of the gate's last layer, so that "
                f"the gate of stage {stage.index} could not open; gate_threshold is "
                f"{self.options.gate_threshold:g}: a lower one leaves more"
            )
        direction = space.strongest_free(key.T @ key / len(key), 1).to(drawn["last"])
        return {name: w.clone() for name, w in new.items()} | {"last": direction * drawn["last"].norm()}

    def _pooled(self, stage: Stage) -> Tensor:
        rows = stage.sample(self.options.samples, stage.random(self.name))
        return pooled_prompts(stage.model, rows, stage.collate, stage.micro_batch_size)

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        if self.gate_spaces:
            whole = gradients.whole()
            for name, space in self.gate_spaces.items():
                g = whole.tensors[f"{GATE}.{name}"]
                g.copy_(space.without(g))
            if gradients.pieces:
                gradients.load_(whole.tensors)
        return {}

    @torch.no_grad()
    def after_step(self, step: Step, weights: Shards) -> None:
        """An optimizer that scales entries one by one leaves the projected directions; so the weights are, too."""
        if self.gate_spaces:
            whole = weights.whole()
            for name, space in self.gate_spaces.items():
                w, start = whole.tensors[f"{GATE}.{name}"], self.start[name]
                w.copy_(start + space.without(w - start))
            if weights.pieces:
                weights.load_(whole.tensors)

    def watched(self) -> dict[str, float]:
        """The mean coefficient of the newest branch in the last forward pass."""
        return {f"{self.name}/gate": float(self.gating.now[:, -1].detach().mean())} if self.gating.now.numel() else {}

    def final_weights(self, stage: Stage) -> None:
        self.gates.append({name: w.cpu() for name, w in self._trained_gate(stage.model).items()})
        self.gating.detach()
        delattr(stage.model, GATE)
        super().final_weights(stage)
        self._attach(stage.model)

    def after_stage(self, stage: Stage) -> None:
        super().after_stage(stage)
        pooled = self._pooled(stage)
        for name, x in features({name: w.to(pooled) for name, w in self.gates[-1].items()}, pooled).items():
            space = self.gate_spaces.get(name, InputSpace.empty(x.shape[1]))
            self.gate_spaces[name] = space.grown(to_float64(x.T @ x) / len(x), self.options.gate_threshold)

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        """Rows with the same prompt are answered together, with the coefficients of this prompt."""
        model = evaluation.model
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(tuple(prompt(row)), []).append(place)
        with self._attached(model) as gates:
            if not gates:
                yield range(len(rows))
                return
            first = [rows[places[0]] for places in alike.values()]
            pooled = pooled_prompts(model, first, evaluation.collate, evaluation.batch_size)
            with torch.no_grad():
                a = torch.cat([gate(pooled) for gate in gates], dim=1)
            for number, places in enumerate(alike.values()):
                self.gating.fixed = a[number : number + 1]
                yield places

    @contextmanager
    def _attached(self, model: Any) -> Iterator[Sequence[Callable[[Tensor], Tensor]]]:
        """The gates; inside, the model's branches are weighed, and after, they are as before."""
        was = self.gating.model is model
        if not was:
            self._attach(model)
        try:
            yield self.gating.gates
        finally:
            self.gating.fixed = None
            if not was:
                self.gating.detach()

    def _attach(self, model: Any, new: Gate | None = None) -> None:
        """Let the gates of finished stages, and the new one, weigh the model's branches."""
        device = base(model).get_input_embeddings().weight.device
        past = [partial(coefficients, {name: w.to(device) for name, w in gate.items()}) for gate in self.gates]
        branches = {} if not past and new is None else {TRAINED: slice(0, len(past))}
        if new is not None:
            branches = {TRAINED: slice(len(past), None)} | ({PAST: slice(0, len(past))} if past else {})
        self.gating.attach(model, [*past, *([new] if new is not None else [])], adapted(model), branches)

    def _trained_gate(self, model: nn.Module) -> GateWeights:
        """Copies of the new gate's weights."""
        whole = weights(model).whole().tensors
        return {name: whole[f"{GATE}.{name}"].detach().float().clone() for name in LAYERS}

    def state(self) -> State:
        state = super().state() | {"known": known(self.gating.lengths)}
        state |= {f"gate_{key}": t for key, t in spaces_state(self.gate_spaces).items()}
        for number, gate in enumerate(self.gates, start=1):
            state |= {f"gate_{number}/{name}": w for name, w in gate.items()}
        if hasattr(self.gating.model, GATE):
            state |= {f"gate/{name}": w for name, w in self._trained_gate(self.gating.model).items()}
        return state

    def load_state(self, state: State, model: nn.Module) -> None:
        super().load_state(state, model)
        width, hidden = full(base(model).get_input_embeddings().weight).shape[1], self.options.gate_width
        shapes = {"first": (hidden, width), "second": (width, hidden), "last": (1, width)}
        self.gates = [
            {name: saved_tensor(state, f"gate_{number}/{name}", *shape) for name, shape in shapes.items()}
            for number in range(1, self.stages + 1)
        ]
        gate_state = {key.removeprefix("gate_"): value for key, value in state.items()}
        widths = {name: shape[1] for name, shape in shapes.items()}
        self.gate_spaces = spaces_from_state(gate_state, widths) if self.stages else {}
        self.gating.lengths = dict(saved_tensor(state, "known", None, 2, kind="integers").tolist())
        if hasattr(model, GATE):
            new = {f"{GATE}.{name}": saved_tensor(state, f"gate/{name}", *shape) for name, shape in shapes.items()}
            weights(model).load_(new)


def known(lengths: dict[int, int]) -> Tensor:
    """Pairs of numbers, int64 [pairs, 2]."""
    return torch.tensor([*lengths.items()], dtype=torch.int64).reshape(-1, 2)
