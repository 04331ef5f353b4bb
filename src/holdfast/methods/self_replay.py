"""Self-generated replay: rehearse samples of the model itself, which needs no old data."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset


class KLReplay(Rehearsal):
    """Self-generated KL replay (arXiv 2605.26097): KL(teacher | student) on samples of the model before the stage."""

    name = "kl_replay"
    Options = preset(source="self", loss="kl", teacher="previous")


class SelfReplay(Rehearsal):
    """Self-generated replay with next-token loss on the model's own samples (arXiv 2605.26097; SSR, 2403.01244)."""

    name = "self_replay"
    Options = preset(source="self", loss="ce")
