"""The name under which method files of holdfast 0.1 import what lies in :mod:`holdfast.engines`."""

from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradient_of, gradient_of_sum, gradients, gradients_of_sums, snapshot, weights

__all__ = ["Shards", "gradient_of", "gradient_of_sum", "gradients", "gradients_of_sums", "snapshot", "weights"]
