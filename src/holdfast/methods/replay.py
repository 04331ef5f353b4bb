"""Experience replay: stored samples of past tasks, learned along with the new one."""

from __future__ import annotations

from holdfast.methods.rehearsal import Rehearsal, preset


class Replay(Rehearsal):
    """Experience replay (Chaudhry et al., 2019, arXiv 1902.10486): next-token loss on stored samples of past tasks.

    ``beside``: L = CE(task) + weight * CE(replayed), each a mean over its own tokens. ``replace``: replayed rows take
    the places of task rows, and a step costs what it costs without replay.
    """

    name = "replay"
    Options = preset(source="past", loss="ce")
