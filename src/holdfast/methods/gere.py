"""GeRe: general samples are rehearsed, and each activation on them stays in the state that it was in."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset

# 1,000 general texts of at most 563 tokens, the model before training as teacher (arXiv 2508.04676).
GENERAL = {"source": "general", "teacher": "start", "ce_weight": 1.0}


class GeRe(Rehearsal):
    """General sample replay with the threshold-based margin loss (arXiv 2508.04676).

    L = CE(task) + CE(general) + weight * TM(general), with TM of :func:`holdfast.losses.margin_loss`. The published
    code averages the two CE if a micro-batch happens to hold rows of both; here they are always added. The published
    weights are 1, 100 and dynamic.
    """

    name = "gere"
    Options = preset(**GENERAL, loss="margin", weight=100.0)


class GeReCE(Rehearsal):
    """GeRe's baseline (BaselineR): only next-token loss on general samples."""

    name = "gere_ce"
    Options = preset(source="general", loss="ce")


class GeReKL(Rehearsal):
    """GeRe's baseline with distillation: CE and KL(teacher | student) at temperature 2, without the factor T^2."""

    name = "gere_kl"
    Options = preset(**GENERAL, loss="kl", temperature=2.0, temperature_squared=False)


class GeReL1(Rehearsal):
    """GeRe's baseline with features: CE and the mean absolute distance of the last hidden states."""

    name = "gere_l1"
    Options = preset(**GENERAL, loss="l1")


class GeReL2(Rehearsal):
    """GeRe's baseline with features: CE and the mean squared distance of the last hidden states."""

    name = "gere_l2"
    Options = preset(**GENERAL, loss="l2")
