"""Trainer state survives JSON and safetensors, and nothing else gets in."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections import OrderedDict, deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from lowrank_dist.checkpoints.codec import StateError, decode_state, encode_state

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.just("$tuple")
)
KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.text(), st.integers()))
STATES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(KEYS, inner), st.frozensets(SCALARS).map(set)
    ),
    max_leaves=20,
)


def through_json(state: Any) -> Any:
    value, tensors = encode_state(state)
    return decode_state(json.loads(json.dumps(value, allow_nan=False)), tensors)


@given(STATES)
def test_what_comes_back_is_what_was_given(state: Any) -> None:
    assert through_json(state) == state


@pytest.mark.parametrize(
    "value",
    [
        float("inf"), -float("inf"), timedelta(minutes=3), Path("/a/b"), Namespace(a=1, b=(2,)), torch.float32,
        torch.device("cpu"), deque([1, 2], maxlen=2), np.float32(1.5), np.int64(3), torch.Size([2, 3]),
    ],
    ids=repr,
)  # fmt: skip
def test_types_of_checkpoints(value: Any) -> None:
    back = through_json({"x": value})["x"]
    assert back == value
    assert isinstance(back, tuple if isinstance(value, torch.Size) else type(value))


def test_arrays_and_nan() -> None:
    state = {"t": torch.arange(6.0).view(2, 3).T.bfloat16(), "a": np.arange(4, dtype=np.uint32), "n": float("nan")}
    value, tensors = encode_state(state)
    back = decode_state(json.loads(json.dumps(value, allow_nan=False)), tensors)
    assert torch.equal(back["t"], state["t"])
    assert back["t"].dtype == torch.bfloat16
    assert np.array_equal(back["a"], state["a"])
    assert back["n"] != back["n"]


def test_an_object_is_refused_with_its_place() -> None:
    with pytest.raises(StateError, match=r"state\['callbacks'\]\['Mine'\]\[1\]: a functools.partial cannot be stored"):
        encode_state({"callbacks": {"Mine": [1, functools.partial(print)]}}, where="state")
    value, _ = encode_state({"hparams": functools.partial(print)}, lossy=True)
    assert "functools.partial" in decode_state(value, {})["hparams"]


def test_marks_of_another_version_are_refused() -> None:
    with pytest.raises(StateError, match=r"\$pickle: not the mark of a stored type"):
        decode_state({"$pickle": "gASV"}, {})


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_a_schedule_goes_on(name: str) -> None:
    def made() -> Any:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
        return optimizer, get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)

    def advance(made: Any, steps: int) -> list[float]:
        optimizer, schedule = made
        return [(optimizer.step(), schedule.step(), schedule.get_last_lr()[0])[2] for _ in range(steps)]

    first, second = made(), made()
    advance(first, 7)
    second[1].load_state_dict(through_json(first[1].state_dict()))
    assert advance(first, 5) == advance(second, 5)


def test_an_ordered_dict_is_a_dict() -> None:
    assert through_json(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}
