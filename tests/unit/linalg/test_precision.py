"""The power loop in tf32, whose rounding is imitated here: a CPU has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.spectra import excess, matrix
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import SVD, products, randomized_svd


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def in_tf32(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the SVD take its device for one with tf32; the sizes of products in it."""
    sizes: list[int] = []

    def product(left: Tensor, right: Tensor) -> Tensor:
        assert torch.get_float32_matmul_precision() == "highest"  # that of everything else
        sizes.append(len(left))
        return to_tf32(left) @ to_tf32(right)

    monkeypatch.setattr(products, "has_tf32", lambda device: True)
    monkeypatch.setattr(products, "tf32_product", product)
    return sizes


def decompose(w: Tensor, rank: int, **options: float) -> SVD:
    return randomized_svd(w, rank, rows=len(w), group=ShardGroup.single(), seed=1, **options)  # type: ignore[arg-type]


def test_rounding_is_that_of_tf32() -> None:
    ulp = 2.0**-10
    given = torch.tensor([1 + ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.6 * ulp, -(1 + 0.4 * ulp)])
    assert to_tf32(given).tolist() == [1 + ulp, 1.0, 1 + 2 * ulp, 1 + ulp, -1.0]


@pytest.mark.parametrize("shape", [(300, 400), (700, 300)])
@pytest.mark.parametrize(("decay", "bound"), [(0.1, 1e-7), (0.5, 1e-7), (1.0, 2e-6)])
@pytest.mark.parametrize("rank", [8, 32])
def test_the_subspace_forgives_tf32(
    shape: tuple[int, int], decay: float, bound: float, rank: int, in_tf32: list[int]
) -> None:
    """Energy is lost to second order: (2^-11)^2 of what the leading directions have over the rest."""
    w, _ = matrix(*shape, decay)
    svd = decompose(w, rank)
    assert len(in_tf32) > 16
    with pytest.MonkeyPatch.context() as plainly:
        plainly.setattr(products, "has_tf32", lambda device: False)
        exact = decompose(w, rank)
    assert excess(w, svd) < excess(w, exact) + bound
    # what the residual is formed from is of fp32: orthonormal, and U S the product of W with V
    eye = torch.eye(rank)
    assert (svd.u.mT @ svd.u - eye).abs().max() < 1e-5
    side = w @ svd.vh.mT - svd.u * svd.s if shape[0] >= shape[1] else w.mT @ svd.u - svd.vh.mT * svd.s
    assert side.abs().max() < 1e-5 * float(svd.s[0])


def test_a_steep_spectrum_goes_on_in_fp32(in_tf32: list[int]) -> None:
    """A block of condition above 30: three products of some thirty."""
    w, _ = matrix(300, 400, 2.0)
    svd = decompose(w, 32)
    assert 0 < len(in_tf32) < 8
    assert excess(w, svd) < 2e-4


def test_estimates_are_taken_in_fp32(in_tf32: list[int]) -> None:
    w, _ = matrix(300, 400, 0.5)
    decompose(w, 8, tolerance=1e-6)
    decompose(w, 8, estimated=True)
    assert in_tf32 == []


def test_a_whole_space_is_taken_in_fp32(in_tf32: list[int]) -> None:
    for shape in ((40, 60), (60, 40)):
        w, _ = matrix(*shape, 0.5)
        decompose(w, 30)
    assert in_tf32 == []
