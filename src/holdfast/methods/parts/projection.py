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

RIDGES = np.geomspace(1e-8, 1e-12, 14)
"""Of the proximal steps of GEM's program, one after another; its vectors have length 1."""

CONVERGED = 1e-12
"""What a ridge may still take from a constraint, as a share of the program's vector d."""


def gem_dual(gram: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """argmin_v 1/2 v^T G G^T v + g^T G^T v subject to v_k >= margin (Lopez-Paz and Ranzato, 2017, equation 11).

    With u_k = |g_k| (v_k - margin), e_k = g_k / |g_k| and d = g + margin sum_k g_k, this is min |sum_k u_k e_k + d|
    subject to u >= 0. Where past gradients depend on each other but for rounding errors, u has no bound. So it is
    solved by proximal points (Rockafellar, 1976): min |sum_k u_k e_k + d|^2 + ridge |u - last u|^2, from u = 0, for one
    ridge of ``RIDGES`` after the other, until u stays where it is. Each is a non-negative least squares problem with
    one solution, which the active sets of Lawson and Hanson give. The multipliers <e_k, g + G^T v> are then at least
    -ridge (u - last u)_k: 1e-12 |d|, or a few 1e-8 |d|, as float32 rounds, where u has no bound.

    Args:
        gram: [k + 1, k + 1], inner products of g_1 ... g_k and, last, g.
        margin: at least 0.

    Returns:
        v, [k].
    """
    from scipy.optimize import nnls

    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0
    units = gram / np.outer(norms, norms)
    start = norms * np.append(np.full(len(gram) - 1, margin), 1.0)  # d, as a mixture of the unit vectors
    products, size = units[:-1] @ start, np.sqrt(max(0.0, start @ units @ start))
    u = np.zeros(len(gram) - 1)
    for ridge in RIDGES:
        last, root = u, np.linalg.cholesky(units[:-1, :-1] + ridge * np.eye(len(u)))
        u = nnls(root.T, np.linalg.solve(root, ridge * last - products))[0]
        if ridge * np.abs(u - last).max() <= CONVERGED * size:
            break
    return margin + u / norms[:-1]


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
