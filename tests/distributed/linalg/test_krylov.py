"""The SVD on 1 to 4 ranks: the same triplets as on one, whatever the shapes, also where a rank has no row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.linalg import SVD, orthonormalize, randomized_svd

# tall, wide and square; rows that no multiple of 64 divides; fewer rows than ranks have blocks; exact and iterated
SHAPES = [(96, 64), (64, 136), (37, 36), (3, 50), (200, 20), (130, 130)]
SPECTRA = ["slow", "steep", "rank 2", "zero", "tiny"]
OPTIONS: list[dict[str, Any]] = [{"power_iterations": 8}, {"tolerance": 1e-4}]
CASES = [(*shape, spectrum, options) for shape in SHAPES for spectrum in SPECTRA for options in OPTIONS]


def weight(rows: int, columns: int, spectrum: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    k = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, k, generator=generator))[0]
    index = torch.arange(1, k + 1)
    values = {
        "slow": index**-0.5,
        "steep": index**-2.0,
        "rank 2": 2.0 * (index == 1) + (index == 2),
        "zero": 0.0 * index,
        "tiny": 1e-22 * index**-0.5,
    }
    return (u * values[spectrum]) @ v.mT


def my_rows(whole: Tensor, group: ShardGroup) -> Tensor:
    partition = RowPartition(rows=whole.shape[0], columns=whole.shape[1], world_size=group.size, block=64)
    return whole[slice(*partition.bounds(group.rank))]


def svds_of_rows() -> list[tuple[Any, ...]]:
    group = ShardGroup()
    return [
        tuple(randomized_svd(my_rows(weight(*case), group), 3, rows=case[0], group=group, seed=1, **options))
        for *case, options in CASES
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_svd_does_not_depend_on_the_world_size(world_size: int) -> None:
    """Sums over the ranks are taken in another order: fp32 rounding, amplified by the gap between singular values.
    Vectors of the null space are arbitrary: there only orthonormality holds."""
    single, eye = ShardGroup.single(), torch.eye(3)
    ranks = run_ranks(world_size, svds_of_rows)
    for case, *found in zip(CASES, *ranks, strict=True):
        rows, columns, spectrum, options = case
        whole = randomized_svd(weight(rows, columns, spectrum), 3, rows=rows, group=single, seed=1, **options)
        parts = [SVD(*part) for part in found]
        u = torch.cat([part.u for part in parts])
        real = int((whole.s > 1e-4 * whole.s[0]).sum())
        assert (u.mT @ u - eye).abs().max() < 1e-5, case
        torch.testing.assert_close(u[:, :real], whole.u[:, :real], rtol=0, atol=1e-4)
        for part in parts:
            torch.testing.assert_close(part.s, whole.s, rtol=1e-5, atol=1e-6 * float(whole.s[0]))
            torch.testing.assert_close(part.vh[:real], whole.vh[:real], rtol=0, atol=1e-4)
            assert (part.vh @ part.vh.mT - eye).abs().max() < 1e-5, case
            assert torch.equal(part.vh, parts[0].vh)
            assert part.iterations == parts[0].iterations
            assert repr(part.estimate) == repr(parts[0].estimate)  # of a NaN too


def orthonormal_rows(condition: float) -> tuple[Tensor, Tensor]:
    group = ShardGroup()
    return orthonormalize(my_rows(columns_of_condition(condition), group), group)


def columns_of_condition(condition: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(150, 8, generator=generator))[0]
    return q * torch.logspace(0, -1, 8) ** torch.tensor(condition).log10()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
@pytest.mark.parametrize("world_size", [2, 4])
def test_orthonormalize_on_ranks(world_size: int, condition: float) -> None:
    """One pass, two passes and TSQR; on 4 ranks the last holds no row."""
    parts = run_ranks(world_size, orthonormal_rows, condition)
    q, r = torch.cat([part[0] for part in parts]).double(), parts[0][1]
    assert all(torch.equal(part[1], r) for part in parts)
    assert (q.mT @ q - torch.eye(8)).abs().max() < 1e-5
    assert (q @ r - columns_of_condition(condition)).abs().max() < 1e-6
