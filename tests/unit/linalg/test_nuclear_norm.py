"""Norms against torch.linalg in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import squared_norm
from lowrank_dist.linalg.nuclear_norm import EXACT_SIDE, nuclear_norm

SINGLE = ShardGroup.single()


@settings(max_examples=30)
@given(rows=st.integers(0, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_squared_norm_is_that_of_fp64_to_the_rounding_of_fp32(rows: int, columns: int, scale: float) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * scale
    assert float(squared_norm(x)) == pytest.approx(float(x.double().square().sum()), rel=3e-7)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_rounding_of_a_squared_norm_averages_out(offset: float) -> None:
    x = torch.randn(1500, 700, generator=torch.Generator().manual_seed(0)) + offset
    assert float(squared_norm(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-8)


@settings(max_examples=30)
@given(rows=st.integers(1, 60), columns=st.integers(1, 60), rank=st.integers(1, 60))
def test_small_matrices_are_exact(rows: int, columns: int, rank: int) -> None:
    """Eigenvalues of an fp64 Gram matrix are off by 1e-16 sigma_1^2, singular values by 1e-8 sigma_1 at most."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    w = torch.randn(rows, min(rank, rows, columns), generator=generator)
    w = w @ torch.randn(w.shape[1], columns, generator=generator)
    exact = torch.linalg.svdvals(w.double())
    found = nuclear_norm(w, rows=rows, group=SINGLE, seed=0)
    assert found == pytest.approx(float(exact.sum()), abs=1e-7 * float(exact[0]) * min(rows, columns))


@pytest.mark.parametrize("shape", [(EXACT_SIDE + 1, 1000), (1000, EXACT_SIDE + 1), (1300, 800)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_large_matrices_are_estimated(shape: tuple[int, int], decay: float) -> None:
    """Five standard errors of 1.4 %; a matrix of equal singular values is exact with every probe."""
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in shape)
    s = torch.arange(1, k + 1) ** -decay
    found = nuclear_norm((u * s) @ v.mT, rows=shape[0], group=SINGLE, seed=0)
    assert found == pytest.approx(float(s.sum()), rel=0.07 if decay else 1e-4)


def test_zero() -> None:
    for shape in ((5, 3), (EXACT_SIDE + 5, EXACT_SIDE + 5)):
        assert nuclear_norm(torch.zeros(shape), rows=shape[0], group=SINGLE, seed=0) == 0
