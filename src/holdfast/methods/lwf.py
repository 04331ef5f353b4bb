"""Learning without forgetting: on the new task's inputs, keep the answers of the model before the stage."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset


class LwF(Rehearsal):
    """Learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282): KL to the previous model on the task's rows.

    L = CE(task) + weight * KL(teacher | student) over the answers' tokens, with T = 2 and weight 1 (equations 2 to 4,
    whose cross-entropy differs from the KL by a constant). The paper and its code have no factor T^2.
    """

    name = "lwf"
    Options = preset(source="current", loss="kl", temperature=2.0, temperature_squared=False)
