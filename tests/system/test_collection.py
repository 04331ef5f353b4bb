"""What a command's start leaves of Python's garbage collection."""

from __future__ import annotations

import gc

import pytest

from holdfast.system.collection import no_collection


def test_it_is_off_within_and_as_before_afterwards():
    assert gc.isenabled()
    with pytest.raises(KeyError), no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_what_is_there_after_the_first_time_alone_is_never_looked_at_again():
    gc.unfreeze()
    try:
        with no_collection():
            pass
        kept = gc.get_freeze_count()
        made = [[] for _ in range(1000)]
        with no_collection():
            pass
        assert 0 < gc.get_freeze_count() <= kept and len(made) == 1000, "what is freed is no longer counted"
    finally:
        gc.unfreeze()
