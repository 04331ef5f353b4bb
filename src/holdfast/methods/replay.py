"""Experience replay: stored samples of past tasks are learned along with the new task."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.options import preset


class Replay(Rehearsal):
    """Experience replay (Chaudhry et al., 2019, arXiv 1902.10486): next-token loss on stored samples of past tasks.

    ``beside``: L = CE(task) + weight * CE(replayed), each a mean over its own tokens. ``replace``: replayed rows take
    the places of task rows, so that a step costs no more than without replay.
    """

    name = "replay"
    Options = preset(source="past", loss="ce")
