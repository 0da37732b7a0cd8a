"""The root of a positive semi-definite matrix: what its square is, also where directions are missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg.square_root import diagonal_of, square_root

SINGLE = ShardGroup.single()


def root_of(m: Tensor) -> Tensor:
    return square_root(m, diagonal_of(m, SINGLE), SINGLE).double()


@pytest.mark.parametrize("side", [1, 127, 128, 300])
@pytest.mark.parametrize("share", [2.0, 0.5], ids=["regular", "singular"])
def test_its_square_is_the_matrix(side: int, share: float) -> None:
    """Features of sizes from 1e-3 to 1e3, each to fp32 rounding of its own size."""
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(max(1, int(share * side)), side, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-3, 3, side, dtype=torch.float64)
    m = x.T @ x / len(x)
    root = root_of(m.float())
    sizes = m.diagonal().sqrt()
    torch.testing.assert_close(root.T @ root / sizes / sizes[:, None], m / sizes / sizes[:, None], rtol=0, atol=3e-6)


def test_what_is_absent_stays_absent() -> None:
    """Features without a value have zero columns, and a copy of a feature adds no row."""
    m = torch.tensor([[4.0, 0, 4, 2], [0, 0, 0, 0], [4, 0, 4, 2], [2, 0, 2, 5]])
    root = root_of(m)
    assert int((root.norm(dim=1) > 0).sum()) == 2
    assert float(root[:, 1].abs().max()) == 0
    torch.testing.assert_close(root.T @ root, m.double())
