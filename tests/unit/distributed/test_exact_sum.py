"""Exact sums against rational arithmetic: any range, any order, rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.distributed.exact_sum import exact_sum
from lowrank_dist.distributed.group import ShardGroup

SINGLE = ShardGroup.single()
fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(values=st.lists(fp32, max_size=40))
def test_the_sum_is_that_of_the_rational_numbers(values: list[float]) -> None:
    exact = sum((Fraction(value) for value in values), Fraction(0))
    assert exact_sum(torch.tensor(values, dtype=torch.float32), SINGLE) == float(exact)


def test_what_fp64_loses_is_kept() -> None:
    """fp64 gives 0, 1 or 2 for these, according to the order."""
    values = torch.tensor([2.0**100, 1.0, -(2.0**100), 1.0])
    assert values.double().sum() != 2
    assert exact_sum(values, SINGLE) == 2


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 3.4028234663852886e38])
def test_the_ends_of_the_range(value: float) -> None:
    assert exact_sum(torch.full((3, 5), value), SINGLE) == 15 * value
    assert math.copysign(1, exact_sum(torch.empty(0), SINGLE)) == 1
