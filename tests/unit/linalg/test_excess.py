"""The estimate of the excess residual: exact where increments of the captured energy are a geometric series."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.linalg.excess import estimated_excess


@given(ratio=st.floats(0.05, 0.95), missing=st.floats(0.01, 1.0), tail=st.floats(0.1, 10.0), earlier=st.integers(0, 3))
def test_a_geometric_series_is_continued(ratio: float, missing: float, tail: float, earlier: int) -> None:
    captured = 5.0  # by the best basis; `missing` of it by none of these yet
    energies = [captured - missing * ratio**-k for k in range(2 + earlier, -1, -1)]
    truth = math.sqrt((tail + missing) / tail) - 1
    estimate = estimated_excess(captured + tail, energies)
    if ratio >= 0.5:
        assert estimate == pytest.approx(truth, rel=1e-6)
    else:  # fast convergence is not taken on trust: at least the last increment is still to come
        assert estimate >= truth * (1 - 1e-9)


@pytest.mark.parametrize(
    ("energies", "estimate"),
    [([1.0, 2.0, 3.0], math.inf), ([1.0, 2.0, 3.5], math.inf), ([1.0, 2.0, 2.0], 0.0), ([1.0, 2.0, 2.0 + 1e-8], 0.0)],
    ids=["increments do not shrink", "increments grow", "nothing gained", "rounding gained"],
)
def test_where_no_series_can_be_told(energies: list[float], estimate: float) -> None:
    assert estimated_excess(4.0, energies) == estimate
