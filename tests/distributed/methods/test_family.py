"""The initialisations on 2 to 4 ranks give what they give on one; the same for the small end of the spectrum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import alone, run_ranks
from lowrank_dist import EVA, NF4, QERA, SVFT, CorDA, LoRAGA, LoRAOne, MiLoRA, OLoRA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.linalg import trailing
from lowrank_dist.linalg.trailing import multiply, row_blocks, trailing_svd
from lowrank_dist.methods import Matrix, Method
from lowrank_dist.quantization.dense import Dense

# (out, in, r); with whole blocks of 64 elements per rank, the last ones leave ranks without rows. The first has an r
# beyond one rank's rows.
SHAPES = [(64, 48, 20), (96, 64, 3), (64, 136, 3), (37, 36, 3), (3, 50, 1), (50, 3, 1), (5, 3, 1)]
FAMILY: dict[str, Method] = {
    "olora": OLoRA(),
    "milora": MiLoRA(),
    "ipm": CorDA(oversampling=1000),
    "kpm": CorDA(corda_method="kpm"),
    "eva": EVA(oversampling=1000),
    "lora_ga": LoRAGA(scale="weight_svd", oversampling=1000),
    "lora_one": LoRAOne(oversampling=1000),
    "random": LoRAGA(direction="random", oversampling=1000),
    "svft": SVFT(oversampling=1000),
    "qera": QERA(oversampling=1000),
    "qera_approx": QERA(approximate=True, oversampling=1000),
}


def separated(rows: int, columns: int, salt: int) -> Tensor:
    """Singular values evenly spaced from 1 to 2: no pair of vectors can turn."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + salt)
    short = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(side, short, generator=generator).double()).Q for side in (rows, columns))
    return ((u * torch.linspace(1, 2, short)) @ v.mT).float()


def cut(whole: Tensor, group: ShardGroup, block: int) -> tuple[RowPartition, Tensor]:
    partition = RowPartition(rows=whole.shape[0], columns=whole.shape[1], world_size=group.size, block=block)
    return partition, whole[slice(*partition.bounds(group.rank))].clone()


def matrix(group: ShardGroup, shape: tuple[int, int, int], method: Method, input_first: bool) -> Matrix:
    outputs, inputs, rank = shape
    weight = separated(outputs, inputs, 1)
    partition, block = cut(weight.T.contiguous() if input_first else weight, group, block=64)
    statistic = None
    if method.statistic == "covariance":
        root = separated(inputs, inputs, 2)
        _, statistic = cut(root.T @ root, group, block=1)
    elif method.statistic == "gradient":
        gradient = separated(outputs, inputs, 3)
        _, statistic = cut(gradient.T.contiguous() if input_first else gradient, group, block=64)
    return Matrix(
        name="w",
        block=block,
        partition=partition,
        group=group,
        rank=rank,
        scaling=0.5,
        input_first=input_first,
        factor_dtype=torch.float32,
        statistic=statistic,
    )


def decompose_all(group: ShardGroup | None = None) -> dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
    """``(left, right, residual)`` of every method, shape and orientation, this rank's rows."""
    group = group or ShardGroup()
    results = {}
    for name, method in FAMILY.items():
        for shape in SHAPES:
            for input_first in (False, True):
                m = matrix(group, shape, method, input_first)
                d = method.decompose(m, NF4() if isinstance(method, QERA) else Dense(dtype=torch.float32))
                results[name, shape, input_first] = (d.factors.left, d.factors.right, d.residual.decoded)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_family_does_not_depend_on_the_world_size(world_size: int) -> None:
    """Factors, hence signs and vectors, to 1e-4 of their largest entry: sums over the ranks are taken in another order,
    and their fp32 rounding of about 3e-7 is divided by gaps between singular values of 1/64. Of EVA's and CorDA's
    covariances, the squares lie as far apart.
    """
    whole = decompose_all(ShardGroup.single())
    parts = run_ranks(world_size, decompose_all)
    for key, (left, right, rest) in whole.items():
        mine = [part[key] for part in parts]
        for actual, expected in (
            (torch.cat([part[0] for part in mine]), left),
            (mine[0][1], right),
            (torch.cat([part[2] for part in mine]), rest),
        ):
            close = {"rtol": 0, "atol": 1e-4 * max(float(expected.abs().max()), 1e-3)}
            torch.testing.assert_close(actual, expected, **close, msg=lambda text, key=key: f"{key}: {text}")
        assert all(torch.equal(part[1], mine[0][1]) for part in mine), key


@alone
def exchange(rows: int, columns: int) -> tuple[list[tuple[int, Tensor]], Tensor, Tensor, Any]:
    group = ShardGroup()
    whole = separated(rows, columns, 1)
    _, block = cut(whole, group, block=64)
    blocks = [(start, peers.clone()) for start, peers in row_blocks(block, group)]
    _, left = cut(whole.T.contiguous(), group, block=1)
    product = multiply(left, block, group)
    trailing.DENSE_SIDE = 0  # the inverse iteration, which runs on rank 0 alone
    return blocks, block, product, trailing_svd(block, 1, rows=rows, group=group, seed=1)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(160, 120), (120, 160), (5, 3)])
def test_row_blocks_and_inverse_iteration(world_size: int, rows: int, columns: int) -> None:
    """All ranks see the same rows once and in order; a product of differently cut matrices is that of the whole ones;
    inverse iteration finds the smallest singular value, 1.
    """
    whole = separated(rows, columns, 1)
    results = run_ranks(world_size, exchange, rows, columns)
    for blocks, _, _, svd in results:
        assert torch.equal(torch.cat([peers for _, peers in blocks]), whole)
        assert [start for start, _ in blocks] == [sum(len(p) for _, p in blocks[:i]) for i in range(len(blocks))]
        torch.testing.assert_close(svd.s, torch.ones(1), rtol=1e-3, atol=0)
        assert torch.equal(svd.vh, results[0][3].vh)
    products = torch.cat([product for _, _, product, _ in results])
    torch.testing.assert_close(products, whole.T @ whole, rtol=1e-5, atol=1e-6)
    u = torch.cat([svd.u for _, _, _, svd in results])
    torch.testing.assert_close((u.mT @ whole).norm(), torch.ones(()), rtol=1e-3, atol=0)


def refused(shape: tuple[int, int, int], method: Method) -> str:
    m = matrix(ShardGroup(), shape, method, False)
    assert m.statistic is not None
    m.statistic.zero_()
    try:
        method.decompose(m, NF4())
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", [CorDA(), QERA()], ids=str)
def test_refusals_come_on_every_rank(method: Method) -> None:
    """No rank is left waiting in a collective, also one without rows."""
    for text in run_ranks(3, refused, (5, 3, 2), method):
        assert "the covariance of w is zero" in text
