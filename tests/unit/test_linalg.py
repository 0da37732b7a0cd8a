"""Randomized SVD in one process against torch.linalg.svd in fp64: theorems, not snapshots."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.comm import ShardGroup
from lowrank_dist.linalg import orthonormalize, randomized_svd, seed_from_name

SINGLE = ShardGroup.single()


def matrix(rows: int, columns: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with singular values ``i ** -decay``, and these."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))[0]
    s = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    return ((u * s) @ v.mT).float(), s


def residual(w: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    return float((w.double() - (u.double() * s.double()) @ vh.double()).norm())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 120),
    columns=st.integers(1, 120),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_triplets_are_orthonormal_ordered_and_near_optimal(
    rows: int, columns: int, decay: float, fraction: float, seed: int
) -> None:
    w, exact = matrix(rows, columns, decay, seed)
    rank = max(1, int(fraction * min(rows, columns)))
    u, s, vh = randomized_svd(w, rank, rows=rows, group=SINGLE, seed=seed, power_iterations=4)
    eye = torch.eye(rank)
    # fp32 CholeskyQR2 is orthonormal to a few units of rounding times sqrt(k) [CQR, theorem 3.1]
    assert (u.mT @ u - eye).abs().max() < 1e-5
    assert (vh @ vh.mT - eye).abs().max() < 1e-5
    assert bool((s[:-1] >= s[1:]).all())
    # singular values of a projection never exceed those of the matrix (Cauchy interlacing); rounding of the fp32
    # matrix and of products with it moves each by a few units of 6e-8 sigma_1 (Weyl)
    assert bool((s.double() <= exact[:rank] + 2e-6 * exact[0]).all())
    # corollary 10.10 of HMT for the mean of the spectral error, times 3 for a single draw; p = oversampling
    p, q, k = min(rank, min(rows, columns) - rank), 4, min(rows, columns)
    spectral = torch.linalg.matrix_norm(w.double() - (u.double() * s.double()) @ vh.double(), ord=2)
    if p < 2:  # the sketch spans the space, or no bound is known: the error is at most the matrix itself
        assert spectral <= (exact[0] if rank < k else 1e-5) * (1 + 1e-5)
    else:
        factor = 1 + math.sqrt(rank / (p - 1)) + math.e * math.sqrt(rank + p) / p * math.sqrt(k - rank)
        bound = factor ** (1 / (2 * q + 1)) * exact[rank] if rank < k else 0.0
        # truncating the sketch to r triplets adds at most sigma_{r+1} [HMT, 9.3]
        assert spectral <= 3 * bound + (exact[rank] if rank < k else 0.0) + 1e-5


@pytest.mark.parametrize(("iterations", "excess"), [(4, 2e-3), (8, 1e-5)])
def test_excess_residual_on_a_slow_spectrum(iterations: int, excess: float) -> None:
    """Oversampling by r: 4 iterations leave about 1e-4, 8 about 1e-7; asserted with a margin for the draw."""
    w, s = matrix(384, 300, 0.5)
    found = randomized_svd(w, 32, rows=384, group=SINGLE, seed=0, power_iterations=iterations)
    assert residual(w, *found) <= (1 + excess) * float(s[32:].norm())


def test_full_rank_is_exact_to_rounding() -> None:
    w, s = matrix(40, 24, 0.5)
    found = randomized_svd(w, 24, rows=40, group=SINGLE, seed=0)
    torch.testing.assert_close(found.s.double(), s, rtol=0, atol=1e-6)
    assert residual(w, *found) < 1e-6 * math.sqrt(24)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 7), (7, 1)])
def test_zero_matrix(shape: tuple[int, int]) -> None:
    u, s, vh = randomized_svd(torch.zeros(shape), 1, rows=shape[0], group=SINGLE, seed=0)
    assert s.tolist() == [0.0]
    assert u.norm() == pytest.approx(1, abs=1e-5)
    assert vh.norm() == pytest.approx(1, abs=1e-5)


def test_rank_deficient_matrix_keeps_orthonormal_factors() -> None:
    w = torch.outer(torch.arange(1.0, 41), torch.ones(30))
    u, s, vh = randomized_svd(w, 5, rows=40, group=SINGLE, seed=0)
    assert s[0] == pytest.approx(float(w.norm()), rel=1e-5)
    assert s[1:].max() < 1e-5 * s[0]
    assert (u.mT @ u - torch.eye(5)).abs().max() < 1e-5
    assert (vh @ vh.mT - torch.eye(5)).abs().max() < 1e-5


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_orthonormalize_survives_any_condition_number(condition: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(200, 16, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    y = ((q * torch.logspace(0, -math.log10(condition), 16, dtype=torch.float64)) @ v).float()
    found, r = orthonormalize(y, SINGLE)
    assert (found.double().mT @ found.double() - torch.eye(16)).abs().max() < 1e-5
    assert (found.double() @ r - y).abs().max() < 1e-6


def test_signs_do_not_depend_on_the_seed() -> None:
    w, _ = matrix(64, 48, 1.0)
    one = randomized_svd(w, 4, rows=64, group=SINGLE, seed=1, power_iterations=8)
    two = randomized_svd(w, 4, rows=64, group=SINGLE, seed=2, power_iterations=8)
    torch.testing.assert_close(one.u, two.u, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.vh, two.vh, rtol=0, atol=1e-4)


def test_seeds_depend_on_the_name_alone() -> None:
    assert seed_from_name("a") == seed_from_name("a")
    assert len({seed_from_name("a"), seed_from_name("b"), seed_from_name("a", 1)}) == 3


def test_rank_above_the_short_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=9 must lie in 1..min\(m, n\)=8"):
        randomized_svd(torch.randn(8, 20), 9, rows=8, group=SINGLE, seed=0)
