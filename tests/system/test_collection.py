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
