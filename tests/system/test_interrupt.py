"""A signal that comes inside nested work stops what is around it, too."""

import os
import signal
import subprocess
import sys

import pytest

from holdfast.errors import Interrupted
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Progress


def test_a_signal_that_an_inner_context_caught_is_the_outer_ones_too():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as outer:
        with Interrupt() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.requested and outer.requested, "at once"
            assert signal.getsignal(signal.SIGTERM) == before, "a second one ends the process"
            assert signal.getsignal(signal.SIGINT) == inner._request
        with Interrupt() as later:
            pass
        assert not later.requested
    assert signal.getsignal(signal.SIGTERM) == before


TWICE = """
import os, signal, sys
from holdfast import cli
from holdfast.system.interrupt import Interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it

def work():
    with Interrupt(), Interrupt() as inner:
        os.kill(os.getpid(), signal.SIGINT)
        assert inner.requested
        print("heard", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

cli.app.registered_commands.clear()
cli.app.command("work")(work)
sys.argv[1:] = ["work"]
cli.main()
"""


def test_the_second_one_ends_the_command_at_once_and_nothing_is_said_to_be_saved():
    done = subprocess.run([sys.executable, "-c", TWICE], check=False, capture_output=True, text=True, timeout=100)
    hint, heard, *rest = [line for line in done.stderr.splitlines() if line]
    assert hint.startswith("holdfast: stops as soon as it can save; a second Ctrl-C ends it at once")
    assert heard == "heard" and done.returncode != 0 and "saved" not in "".join(rest), done.stderr


def test_a_bar_stops_its_work_but_not_when_all_is_done():
    with Interrupt() as interrupt, interrupt.bar(Progress(quiet=True), "work") as on_batch:
        interrupt.requested = True
        on_batch(3, 3)
        with pytest.raises(Interrupted, match="stopped in 'work' after 2 of 3"):
            on_batch(2, 3)
    with pytest.raises(Interrupted, match="stopped before 'more'"), interrupt.bar(Progress(quiet=True), "more"):
        raise AssertionError("it was begun")
