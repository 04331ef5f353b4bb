"""The small dense problems of gradient projections, in float64: GEM's dual program, and a basis of directions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.engines.shards import Shards

RANK = 1e-4
"""Directions below this share of the strongest one count as rounding errors. With it, the Gram matrix in float64 gives
directions that are orthonormal to 1e-6."""


def gem_dual(gram: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """argmin_v 1/2 v^T G G^T v + g^T G^T v subject to v_k >= margin (Lopez-Paz and Ranzato, 2017, equation 11).

    With u = v - margin this is min |G^T u + g + margin sum_k g_k| subject to u >= 0, a non-negative least squares
    problem that the active-set algorithm of Lawson and Hanson solves exactly. Only inner products of its columns
    matter, so the square root of the Gram matrix takes their place. At the solution, the multipliers
    G (g + G^T v) are >= 0.

    Args:
        gram: [k + 1, k + 1], inner products of g_1 ... g_k and, last, g.
        margin: at least 0.

    Returns:
        v, [k].
    """
    from scipy.optimize import nnls

    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0
    values, vectors = np.linalg.eigh(gram / np.outer(norms, norms))
    columns = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # of unit length; [k + 1, k + 1]
    start = columns @ (norms * np.append(np.full(len(gram) - 1, margin), 1.0))
    return margin + nnls(columns[:, :-1], -start)[0] / norms[:-1]


def principal_directions(stack: Shards, lengths: Tensor, capacity: int) -> tuple[Shards, Tensor]:
    """An orthonormal basis of the span of vectors, or their ``capacity`` strongest directions if it needs more.

    The vectors, scaled to ``lengths``, are the rows of a matrix. The directions are its right singular vectors, which
    approximate the rows best, computed from the eigenvectors of the Gram matrix.

    Args:
        stack: [count, ...] of any lengths; a vector of zeros gives no direction.
        lengths: [count], float64.

    Returns:
        (stack of at most ``capacity`` orthonormal vectors, float32; their singular values, descending, float64).
    """
    gram = stack.gram()
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, lengths / norms, 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    strengths, vectors = values.flip(0).clamp(min=0).sqrt()[:capacity], vectors.flip(1)[:, :capacity]
    significant = strengths > RANK * strengths.max()
    strengths = strengths[significant]
    return stack.combined((vectors[:, significant] / strengths).T * scale), strengths
