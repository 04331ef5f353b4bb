"""Learning without forgetting: on the new task's inputs, keep the answers of the model before the stage."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset


class LwF(Rehearsal):
    """Learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282): KL to the previous model on the task's rows.

    L = CE(task) + weight * T^2 * KL(teacher | student) over the answers' tokens; T = 2 and weight 1 are the paper's.
    """

    name = "lwf"
    Options = preset(source="current", loss="kl", temperature=2.0)
