"""The methods of "Forgetting in Language Models" (arXiv 2605.26097), by its names.

Old rows are drawn from the model (``source: self``) or real (``source: general`` with a path).
"""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset

COEFFICIENT = 10.0  # in the paper's comparison of methods


class NTPPre(Rehearsal):
    """Next-token loss on old rows beside the task's: L = NTP(task) + weight * NTP(old)."""

    name = "ntp_pre"
    Options = preset(source="self", loss="ce", weight=COEFFICIENT)


class KLPre(Rehearsal):
    """KL to the model before the stage on old rows: L = NTP(task) + weight * KL(before | now), softmax at T = 1."""

    name = "kl_pre"
    Options = preset(source="self", loss="kl", weight=COEFFICIENT)


class KLDown(Rehearsal):
    """KL to the model before the stage on the task's own rows: `lwf` at temperature 1."""

    name = "kl_dwn"
    Options = preset(source="current", loss="kl", weight=COEFFICIENT)


class Replace(Rehearsal):
    """Old rows replace a share of each batch, and L is the mean next-token loss over all its rows."""

    name = "replace"
    Options = preset(source="self", loss="ce", way="replace", ratio=0.125)
