"""The small end of the spectrum against a whole SVD in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import SVD, trailing
from lowrank_dist.linalg.trailing import multiply, trailing_svd

SINGLE = ShardGroup.single()


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))


def with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    """A matrix with these singular values, as many as the short side is long."""
    u, v = (torch.linalg.qr(gaussian(side, len(values)).double()).Q for side in (rows, columns))
    return ((u * values) @ v.mT).float()


def solve(w: Tensor, rank: int) -> SVD:
    return trailing_svd(w, rank, rows=w.shape[0], group=SINGLE, seed=1)


def assert_orthonormal(svd: SVD) -> None:
    identity = torch.eye(len(svd.s))
    torch.testing.assert_close(svd.u.mT @ svd.u, identity, rtol=0, atol=2e-6)
    torch.testing.assert_close(svd.vh @ svd.vh.mT, identity, rtol=0, atol=2e-6)


def product(svd: SVD) -> Tensor:
    return (svd.u.double() * svd.s) @ svd.vh.double()


@settings(max_examples=60)
@given(rows=st.integers(1, 50), columns=st.integers(1, 50), data=st.data())
def test_any_shape_and_rank(rows: int, columns: int, data: st.DataObject) -> None:
    """s to the rounding of fp32 weights, 1e-7 sigma_1, with a margin of 10; the split W = rest + trailing part leaves
    singular values on either side as they are, which no wrong basis does.
    """
    rank = data.draw(st.integers(1, min(rows, columns)))
    w = gaussian(rows, columns)
    svd, exact = solve(w, rank), torch.linalg.svdvals(w.double())
    torch.testing.assert_close(svd.s.double(), exact[-rank:], rtol=0, atol=1e-6 * float(exact[0]))
    assert_orthonormal(svd)
    kept = torch.linalg.svdvals(w.double() - product(svd))
    expected = torch.cat([exact[:-rank], torch.zeros(rank, dtype=torch.float64)])
    torch.testing.assert_close(kept, expected, rtol=0, atol=2e-6 * float(exact[0]))


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (40, 60), (40, 40)])
def test_triplets_of_a_known_spectrum(rows: int, columns: int) -> None:
    """Each vector, not only the span: neighbouring values differ by a factor, errors are fp32 rounding over the gap.

    The smallest value is 2e-4 sigma_1, so that a rounding of 6e-8 sigma_1 turns a vector by up to 3e-4.
    """
    w = with_spectrum(rows, columns, 0.8 ** torch.arange(40, dtype=torch.float64))
    svd = solve(w, 5)
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close(svd.s.double(), s[-5:], rtol=1e-3, atol=0)
    cosines_u = (svd.u.double() * u[:, -5:]).sum(dim=0).abs()
    cosines_v = (svd.vh.double() * vh[-5:]).sum(dim=1).abs()
    torch.testing.assert_close(torch.cat([cosines_u, cosines_v]), torch.ones(10).double(), rtol=0, atol=1e-6)
    assert bool((svd.vh.gather(1, svd.vh.abs().argmax(dim=1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("null", [3, 10, 40])
def test_rank_deficient_matrices(rows: int, columns: int, null: int) -> None:
    """5 triplets, of which `null` vanish: orthonormal all the same, W V and U^T W are rounding where s is."""
    values = torch.ones(40, dtype=torch.float64)
    values[40 - null :] = 0
    w = with_spectrum(rows, columns, values)
    svd = solve(w, 5)
    assert_orthonormal(svd)
    vanishing = min(null, 5)
    assert float(svd.s[5 - vanishing :].max()) < 1e-6
    assert float((w @ svd.vh[5 - vanishing :].mT).abs().max()) < 1e-6
    assert float((svd.u[:, 5 - vanishing :].mT @ w).abs().max()) < 1e-6
    torch.testing.assert_close(svd.s[: 5 - vanishing], torch.ones(5 - vanishing), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spectrum", ["flat", "steep", "deficient"])
@pytest.mark.parametrize("wide", [False, True])
def test_inverse_iteration_replaces_the_eigenvectors(
    monkeypatch: pytest.MonkeyPatch, spectrum: str, wide: bool
) -> None:
    """What it captures exceeds the smallest possible by at most 2e-3: it stops at steps of 1e-4, and steps shrink by a
    factor of two or better. Where the spectrum is deficient, it may exceed it by rounding only.
    """
    monkeypatch.setattr(trailing, "DENSE_SIDE", 0)
    short = 200
    w = {
        "flat": gaussian(2 * short, short),
        "steep": gaussian(2 * short, short) * torch.arange(1, short + 1) ** -0.5,
        "deficient": with_spectrum(
            2 * short, short, torch.ones(short).double().masked_fill_(torch.arange(short) > 180, 0)
        ),
    }[spectrum]
    w = w.mT.contiguous() if wide else w
    svd, exact = solve(w, 8), torch.linalg.svdvals(w.double())
    assert_orthonormal(svd)
    captured, least = float(svd.s.double().square().sum()), float(exact[-8:].square().sum())
    assert captured >= least * (1 - 1e-5) - 1e-12
    assert captured <= least * (1 + 2e-3) + 1e-10 * float(exact[0]) ** 2
    # the projection is exact on the short side, also where the subspace has not converged
    projected = (
        svd.u.double() @ (svd.u.double().mT @ w.double()) if wide else w.double() @ svd.vh.mT.double() @ svd.vh.double()
    )
    torch.testing.assert_close(product(svd), projected, rtol=0, atol=1e-6 * float(exact[0]))


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (40, 60)])
def test_any_basis_of_the_subspace_gives_the_same_triplets(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    """Null spaces and unconverged iterations leave bases that are not singular vectors. 1e-5: the smallest value is
    7e-2 sigma_1, its neighbours a tenth apart.
    """
    w = with_spectrum(rows, columns, torch.linspace(1, 3, 40).double().pow(2.5))
    expected, eigh = solve(w, 5), torch.linalg.eigh
    turn = torch.block_diag(torch.linalg.qr(gaussian(5, 5).double()).Q, torch.eye(35).double())

    def turned(gram: Tensor) -> Any:
        values, vectors = eigh(gram)
        assert len(values) == 40
        return torch.return_types.linalg_eigh((values, vectors @ turn))

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    for actual, whole in zip(solve(w, 5), expected, strict=True):
        torch.testing.assert_close(actual, whole, rtol=0, atol=1e-5)


def test_inverse_iteration_follows_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trailing, "DENSE_SIDE", 0)
    w = gaussian(300, 150)
    one, same, other = (trailing_svd(w, 4, rows=300, group=SINGLE, seed=s).vh for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank=. must lie in 1\.\.min\(m, n\)=4 of the 4 x 9 matrix"):
        solve(gaussian(4, 9), rank)


def test_multiply() -> None:
    left, right = gaussian(7, 5), gaussian(5, 3)
    torch.testing.assert_close(multiply(left, right, SINGLE), left @ right)
