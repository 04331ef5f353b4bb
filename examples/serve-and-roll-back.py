"""Serve the newest month of a run, unless it cost too much: then go back to the month before, and serve that.

usage: python examples/serve-and-roll-back.py RUN

A server that runs already does the same by `holdfast serve RUN --follow` beside `holdfast rollback RUN --to STAGE`.
"""

import sys

import holdfast
from holdfast.deploy.serve import serve

FORGOTTEN, MOVED = 0.05, 0.05  # what a month may cost: of the earlier months' scores, and of the general loss

run = sys.argv[1]
*earlier, newest = (stage for stage in holdfast.status(run)["stages"] if stage["state"] in ("current", "kept"))
if (newest["forgetting"] or 0) > FORGOTTEN or (newest["general_loss"] or 0) > MOVED:
    before = earlier[-1]["stage"] if earlier else 0
    print(f"{newest['task']} cost too much: back to stage {before}")
    holdfast.rollback(run, to=before)
serve(run, follow=True)
