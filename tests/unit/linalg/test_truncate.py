"""Truncation of a product of factors, against the dense singular value decomposition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.linalg.truncate import energy_kept, singular_values, truncate

SHAPES = {"rows": st.integers(1, 24), "columns": st.integers(1, 24), "width": st.integers(1, 12)}


def factors(rows: int, columns: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A ``[width, columns]`` and B ``[rows, width]``, fp64, with a spectrum that falls off."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(width, columns, generator=g, dtype=torch.float64)
    return a * torch.arange(1, width + 1)[:, None] ** -0.7, torch.randn(rows, width, generator=g, dtype=torch.float64)


@settings(max_examples=100)
@given(**SHAPES, rank=st.integers(1, 14), scaling=st.sampled_from([1.0, 0.25, 3.0, -2.0]), seed=st.integers(0, 999))
def test_what_is_lost_is_the_tail(rows: int, columns: int, width: int, rank: int, scaling: float, seed: int) -> None:
    """Eckart-Young: no matrix of that rank is nearer, in the Frobenius or in the spectral norm."""
    a, b = factors(rows, columns, width, seed)
    dense = scaling * b @ a
    expected = torch.linalg.svdvals(dense)[: min(rows, columns, width)]
    cut = truncate(a, b, rank, scaling=scaling)
    torch.testing.assert_close(cut.singular_values, expected, rtol=0, atol=1e-13 * float(expected[0]))
    torch.testing.assert_close(singular_values(a, b, scaling=scaling), cut.singular_values, rtol=1e-12, atol=1e-13)
    assert (cut.a.shape, cut.b.shape) == ((rank, columns), (rows, rank))
    error, tail = dense - cut.b @ cut.a, expected[rank:]
    size = float(expected[0])
    assert float(error.norm()) == pytest.approx(float(tail.norm()), abs=1e-12 * size)
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(
        float(expected[rank:].max()) if len(tail) else 0.0, abs=1e-12 * size
    )
    kept = energy_kept({"x": cut.singular_values}, rank)
    assert 1 - kept.overall == pytest.approx(float((error.norm() / dense.norm()) ** 2), abs=1e-12)


@settings(max_examples=30)
@given(**SHAPES, seed=st.integers(0, 99))
def test_singular_values_are_split_evenly(rows: int, columns: int, width: int, seed: int) -> None:
    a, b = factors(rows, columns, width, seed)
    cut = truncate(a, b, width)
    rank = min(rows, columns, width)
    roots = torch.zeros(width, dtype=torch.float64)
    roots[:rank] = cut.singular_values.sqrt()
    for gram in (cut.a @ cut.a.mT, cut.b.mT @ cut.b):
        torch.testing.assert_close(gram, torch.diag(roots**2), rtol=0, atol=1e-12 * float(roots[0] ** 2))


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_a_zero_update_loses_nothing(zero: str) -> None:
    a, b = factors(6, 5, 4, 0)
    cut = truncate(a * (zero == "b"), b * (zero == "a"), 2)
    assert not cut.a.any()
    assert not cut.b.any()
    assert not cut.singular_values.any()
    kept = energy_kept({"x": cut.singular_values, "y": torch.tensor([2.0, 1.0])}, 1)
    assert (kept.overall, kept.matrices) == (pytest.approx(0.8), {"x": 1.0, "y": pytest.approx(0.8)})
    assert energy_kept({"x": cut.singular_values}, 1).overall == 1.0


@settings(max_examples=30)
@given(true_rank=st.integers(1, 3), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_rank_deficient_updates(true_rank: int, rank: int, seed: int) -> None:
    """Factors of width 8 whose product has a lower rank: exact from that rank on, and finite."""
    a, b = factors(20, 15, true_rank, seed)
    mix = torch.randn(true_rank, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide_a, wide_b = torch.linalg.pinv(mix) @ a, b @ mix
    cut = truncate(wide_a, wide_b, rank)
    expected = torch.linalg.svdvals(b @ a)
    assert float((b @ a - cut.b @ cut.a).norm()) == pytest.approx(
        float(expected[rank:].norm()), abs=1e-12 * float(expected[0])
    )
    assert float(cut.singular_values[true_rank:].max()) < 1e-12 * float(expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_cancelling_products_keep_their_difference(dtype: torch.dtype) -> None:
    """``B A - B_0 A_0`` with a change of 1e-3: relative to the difference, not to the products, fp64 is left."""
    a0, b0 = (t.to(dtype) for t in factors(60, 50, 8, 0))
    a, b = ((t.double() * (1 + 1e-3 * torch.randn(t.shape))).to(dtype) for t in (a0, b0))
    dense = b.double() @ a.double() - b0.double() @ a0.double()
    cut = truncate(torch.cat([a, a0]), torch.cat([b, -b0], dim=1), 16)
    assert float((cut.b @ cut.a - dense).norm()) < 1e-11 * float(dense.norm())
    assert float(dense.norm()) < 1e-2 * float((b0.double() @ a0.double()).norm())


def test_energy_of_several_updates() -> None:
    """Larger updates count for more in the sum; the least is that of one matrix."""
    kept = energy_kept({"large": torch.tensor([30.0, 40.0]).flip(0), "small": torch.tensor([1.0, 1.0])}, 1)
    assert kept.overall == pytest.approx((1600 + 1) / (2500 + 2))
    assert (kept.least_of, kept.least) == ("small", pytest.approx(0.5))
