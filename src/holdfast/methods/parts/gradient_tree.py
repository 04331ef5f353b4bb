"""A tree over past tasks by the similarity of their gradients, and a bandit that searches it for the nearest task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from holdfast.engines.shards import Shards
from holdfast.system.shapes import Count, of_shape


class LoraLayers:
    """The LoRA weights A and B of a model as a matrix with one row a layer, float32 [layers, width].

    A layer holds the weights with the same number in their names, such as ``model.layers.3.``; LoRA weights outside
    numbered layers are the last row. Rows of narrower layers end in zeros, which change no distance or product.
    """

    def __init__(self, weights: Shards):
        layers: dict[str, list[str]] = {}
        for name in weights.tensors:
            if "lora_" in name:
                numbered = re.match(r".*?\.\d+\.", name)
                layers.setdefault(numbered[0] if numbered else "", []).append(name)
        self.layers = [layers[key] for key in sorted(layers, key=lambda key: key == "")]
        sizes = [sum(weights.tensors[name].numel() for name in names) for names in self.layers]
        device = next(iter(weights)).device
        self.widths = torch.tensor(sizes, device=device).unsqueeze(1)  # [layers, 1], without the zeros
        self.padding = [torch.zeros(max(sizes) - size, device=device) for size in sizes]
        self.shape = (len(sizes), max(sizes))

    def matrix(self, vector: Shards) -> Tensor:
        """The LoRA part of a vector over the trainable weights, as a new matrix."""
        pieces: list[Tensor] = []
        for names, padding in zip(self.layers, self.padding, strict=True):
            pieces += [vector.tensors[name].detach().flatten().float() for name in names] + [padding]
        return torch.cat(pieces).view(len(self.layers), -1)

    def add_(self, vector: Shards, matrix: Tensor) -> None:
        """Add a matrix to the LoRA part of a vector, in place."""
        for names, row in zip(self.layers, matrix, strict=True):
            tensors = [vector.tensors[name] for name in names]
            pieces = row.split([t.numel() for t in tensors] + [len(row) - sum(t.numel() for t in tensors)])
            for t, piece in zip(tensors, pieces[:-1], strict=True):
                t.add_(piece.view_as(t))


def direction(gradient: Tensor, norm: int) -> Tensor:
    """Rows [..., width] at unit length in the L1 (``norm`` 1) or L2 norm (2); a row of zeros stays one."""
    return normalize(gradient, p=norm, dim=-1, eps=torch.finfo(gradient.dtype).tiny)


def distance(a: Tensor, b: Tensor, norm: int) -> Tensor:
    """|a - b| / 2 over the last dimension, in [0, 1] for directions; with L2 it is sqrt((1 - cosine) / 2)."""
    return torch.linalg.vector_norm(a - b, ord=norm, dim=-1) / 2


def pull_l1(current: Tensor, past: Tensor, bound: Tensor) -> Tensor:
    """The step that lowers the L1 distance |current - past|: each entry moves to the past one, by ``bound`` at most.

    It is the step of the proximal operator: current + step = argmin_u |u - current|^2 / 2 + bound |u - past|_1. If it
    lowered a row's product with the past one, the entries that lower it are left out, so that no product falls.

    Args:
        current: directions [layers, width].
        past: the same of a past task.
        bound: [layers, 1].
    """
    step = torch.clamp(past - current, -bound, bound)
    gain = step * past
    return step.masked_fill_((gain < 0) & (gain.sum(-1, keepdim=True) < 0), 0)


def pull_cosine(current: Tensor, past: Tensor, strength: float) -> Tensor:
    """The step along the gradient of the cosine: strength (past - cosine * current), for directions [layers, width].

    Its product with the past direction is strength (1 - cosine^2) >= 0, and it is orthogonal to the current one.
    """
    cosine = (past * current).sum(-1, keepdim=True)
    return (past - cosine * current).mul_(strength)


@dataclass(frozen=True)
class Group:
    """A node of the tree: past tasks with similar gradients. A single task is a leaf.

    Attributes:
        tasks: numbers of past tasks, from 0.
        spread: largest distance between two of its tasks, for each layer.
        layer: the layer whose gradients distinguish its children.
        children: none for a leaf.
    """

    tasks: tuple[int, ...]
    spread: tuple[float, ...]
    layer: int = 0
    children: tuple[Group, ...] = ()

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Group:
        """The group of which ``dataclasses.asdict`` gave ``plain``, read back from JSON.

        Raises:
            ValueError: it is none.
        """
        of_shape(dict[str, Any], plain)
        (
            of_shape(list[Count], plain["tasks"], "tasks"),
            of_shape(list[float], plain["spread"], "spread"),
            of_shape(Count, plain["layer"], "layer"),
        )
        children = tuple(cls.from_plain(child) for child in plain["children"])
        return cls(tuple(plain["tasks"]), tuple(plain["spread"]), plain["layer"], children)

    def check(self, tasks: Iterable[int], layers: int) -> None:
        """ValueError if it is no tree over these tasks and so many layers."""
        parts = sorted(task for child in self.children for task in child.tasks)
        divided = parts == sorted(self.tasks) if self.children else len(self.tasks) == 1
        if not divided or sorted(self.tasks) != sorted(tasks) or len(self.spread) != layers or self.layer >= layers:
            raise ValueError("tree: is none over the past tasks")
        for child in self.children:
            child.check(child.tasks, layers)


def build_tree(directions: Sequence[Tensor], norm: int) -> Group:
    """The tree over tasks, one level a layer.

    A group is split in two by the distances of its level's layer: its tasks are joined, the nearest by mean distance
    first, until two parts are left. A layer in which all tasks are equal is skipped. Tasks that are still together
    after the last layer become single leaves.

    Args:
        directions: one a task, [layers, width].
        norm: as in :func:`distance`.
    """
    layers = len(directions[0])
    apart = torch.stack([torch.stack([distance(a, b, norm) for b in directions]) for a in directions]).cpu()

    def group(tasks: list[int], layer: int) -> Group:
        spread = tuple(apart[tasks][:, tasks].amax((0, 1)).tolist())
        if len(tasks) == 1:
            return Group(tuple(tasks), spread)
        if layer == layers:
            return Group(tuple(tasks), spread, layers - 1, tuple(group([task], layer) for task in tasks))
        if spread[layer] == 0:
            return group(tasks, layer + 1)
        parts = [[task] for task in tasks]
        while len(parts) > 2:
            pairs = combinations(parts, 2)
            a, b = min(pairs, key=lambda pair: float(apart[pair[0]][:, pair[1], layer].mean()))
            parts.remove(b)
            a += b
        return Group(tuple(tasks), spread, layer, tuple(group(part, layer + 1) for part in parts))

    return group(list(range(len(directions))), 0)


class TreeSearch:
    """A bandit over the leaves of a tree: each round chooses a task and learns its residuals, in [0, 1], one a layer.

    The lower confidence bound of a task after n of t rounds is mean - exploration sqrt(log t / n). A group's bound is
    that of all its tasks' rounds together, less its spread, or the lowest bound of its children if that is higher: no
    task in the group can be better than either.
    """

    def __init__(self, tree: Group, exploration: float):
        self.tree = tree
        self.exploration = exploration
        self.rounds = [0] * len(tree.tasks)
        self.residuals = [[0.0] * len(tree.spread) for _ in tree.tasks]  # sum over a task's rounds, for each layer

    def lower_bound(self, group: Group, layer: int) -> float:
        """The lower confidence bound of a group's best task by a layer's residuals; -inf before its first round."""
        rounds = sum(self.rounds[task] for task in group.tasks)
        if rounds == 0:
            return -math.inf
        mean = sum(self.residuals[task][layer] for task in group.tasks) / rounds
        bound = mean - self.exploration * math.sqrt(math.log(sum(self.rounds) + 1) / rounds)
        if not group.children:
            return bound
        return max(bound - group.spread[layer], min(self.lower_bound(child, layer) for child in group.children))

    def choose(self) -> int:
        """Descend from the root to a task, at each level to the child with the lowest bound of the level's layer."""
        group = self.tree
        while group.children:
            bounds = [self.lower_bound(child, group.layer) for child in group.children]
            group = group.children[bounds.index(min(bounds))]
        return group.tasks[0]

    def observe(self, task: int, residuals: Sequence[float]) -> None:
        """End a round with the residuals of the chosen task, one a layer."""
        self.rounds[task] += 1
        self.residuals[task] = [a + b for a, b in zip(self.residuals[task], residuals, strict=True)]
