"""A signal that comes inside nested work stops what is around it, too."""

import os
import signal

from holdfast.system.interrupt import Interrupt


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
