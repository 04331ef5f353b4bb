"""Serve the newest month of a run, unless it cost too much: then go back to the month before, and serve that.

usage: python examples/serve-and-roll-back.py RUN

A server that runs already does the same by `holdfast serve RUN --follow` beside `holdfast rollback RUN --to STAGE`.
"""

import sys

import holdfast
from holdfast.deploy.serve import serve

FORGOTTEN, MOVED = 0.05, 0.05  # what a month may cost: of the earlier months' scores, and of the general loss

run = sys.argv[1]
held = [stage for stage in holdfast.status(run)["stages"] if stage["state"] in ("current", "kept")]
if held and ((held[-1]["forgetting"] or 0) > FORGOTTEN or (held[-1]["general_loss"] or 0) > MOVED):
    before = held[-2]["stage"] if len(held) > 1 else 0
    print(f"{held[-1]['task']} cost too much: back to stage {before}")
    holdfast.rollback(run, to=before)
serve(run, follow=True)
