"""What is read back has the shape that its reader needs, or a message names the key that has not."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import with_config
from typing_extensions import TypedDict

from holdfast.engines.saved import saved_tensor
from holdfast.system.shapes import AS_WRITTEN, Count, alike, of_shape


@with_config(AS_WRITTEN)
class Line(TypedDict):
    step: Count
    loss: float | None


def test_a_value_of_its_shape_is_given_back_as_it_is():
    lines = [{"step": 1, "loss": None, "more": [1]}, {"step": 2, "loss": 1}]
    assert of_shape(list[Line], lines) is lines


WRONG = {
    "line 2: loss: field required": [{"step": 1, "loss": None}, {"step": 1}],
    "line 1: step: .*, not True": [{"step": True, "loss": 1.0}],
    "line 1: step: .*, not -1": [{"step": -1, "loss": 1.0}],
    "line 1: step: .*, not 1000": [{"step": 10**30, "loss": 1.0}],
    "line 1: loss: .*, not '1.0'": [{"step": 1, "loss": "1.0"}],
    "it: input should be a valid list, not {}": {},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_message_names_line_and_key(said):
    with pytest.raises(ValueError, match=said):
        of_shape(list[Line], WRONG[said])


def test_what_is_alike():
    assert alike(1, 0.5) and alike(math.inf, 0) and alike([0.1, 1], (0.9, 0.99)) and alike(None, 1.0) and alike({}, {})
    assert not alike(True, 1) and not alike(1, False) and not alike("x", 1.0) and not alike([1.0], (0.9, 0.99))
    assert not alike(10**30, 1) and not alike({}, None) and not alike([], {}) and not alike(1, "x")


def test_a_saved_tensor_has_its_shape_and_kind():
    state = {"a": torch.zeros(2, 3), "n": torch.tensor([1, 2]), "m": torch.tensor([-1])}
    assert saved_tensor(state, "a", None, 3) is state["a"] and saved_tensor(state, "n", 2, kind="counts") is state["n"]
    assert saved_tensor(state, "m", 1, kind="integers") is state["m"]
    for key, shape, kind in (
        ("b", (None,), "numbers"), ("a", (None, 4), "numbers"), ("a", (6,), "numbers"), ("a", (2, 3), "counts"),
        ("n", (2,), "numbers"), ("m", (1,), "counts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{key}: "):
            saved_tensor(state, key, *shape, kind=kind)
