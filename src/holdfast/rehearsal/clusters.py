"""A choice of rows that covers all clusters of them: those nearest to each centre."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2


def nearest_to_centres(points: NDArray[np.float64], count: int, clusters: int, seed: int) -> list[int]:
    """Numbers of ``count`` points, in order: of each cluster, in proportion to its size, those nearest to its centre.

    Clusters are those of k-means with k-means++ (Arthur and Vassilvitskii, 2007). Where shares are no whole numbers,
    the largest remainders are rounded up.

    Args:
        points: [points, width].
        clusters: at most; there are no more than different points.
        seed: of the first centres.
    """
    if count >= len(points):
        return [*range(len(points))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a cluster without points
        k = min(clusters, len(np.unique(points, axis=0)))
        centres, labels = kmeans2(points, k, iter=100, minit="++", seed=np.random.default_rng(seed))
    away = np.linalg.norm(points - centres[labels], axis=1)
    chosen: list[int] = []
    for cluster, size in enumerate(shares(np.bincount(labels, minlength=len(centres)), count)):
        members = np.flatnonzero(labels == cluster)
        chosen += members[np.argsort(away[members], kind="stable")[:size]].tolist()
    return sorted(chosen)


def shares(sizes: NDArray[np.int64], count: int) -> list[int]:
    """Divide ``count`` in proportion to sizes: whole numbers of this sum, none above its size (Hamilton's method)."""
    exact = sizes * count / sizes.sum()
    whole = np.floor(exact).astype(int)
    up = np.argsort(whole - exact, kind="stable")[: count - whole.sum()]
    whole[up] += 1
    return whole.tolist()
