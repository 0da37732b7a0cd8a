"""QERA against the formula of its paper in fp64, and against every other correction of the same rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_dist import NF4, QERA, LoftQ, LoRA, PiSSA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Decomposition, Matrix
from lowrank_dist.quantization.dense import Dense

SINGLE = ShardGroup.single()
WHOLE = 1000  # oversampling to the whole short side: the randomized SVD is exact to rounding
RANK, SCALING = 6, 0.5


def gaussian(rows: int, columns: int, salt: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns + salt * 10**6))


def second_moments(inputs: int, tokens: int) -> Tensor:
    """Correlated inputs, one of them a thousand times as large as the others, one always zero."""
    x = gaussian(tokens, inputs, 1) @ torch.linalg.matrix_exp(gaussian(inputs, inputs, 2) / inputs)
    x[:, 3] *= 1000
    x[:, 5] = 0
    return x.T @ x / tokens


def matrix(outputs: int, inputs: int, *, input_first: bool = False, tokens: int = 4000, **options: Any) -> Matrix:
    weight = gaussian(outputs, inputs)
    block = weight.T.contiguous() if input_first else weight
    defaults: dict[str, Any] = {"factor_dtype": torch.float32, "statistic": second_moments(inputs, tokens)}
    return Matrix(
        name="w",
        block=block,
        partition=RowPartition(rows=block.shape[0], columns=block.shape[1], world_size=1, block=64),
        group=SINGLE,
        rank=RANK,
        scaling=SCALING,
        input_first=input_first,
        **{**defaults, **options},
    )


def as_linear(m: Matrix, tensor: Tensor) -> Tensor:
    return (tensor.T if m.input_first else tensor).double()


def errors(m: Matrix, d: Decomposition) -> tuple[Tensor, Tensor]:
    """What the quantization lost, and what the factors add, ``[out, in]`` fp64."""
    lost, added = m.block - d.residual.decoded, d.factors.left.double() @ d.factors.right.double()
    return as_linear(m, lost), m.scaling * as_linear(m, added)


def output_error(m: Matrix, error: Tensor) -> float:
    """``E ||D x||^2`` for the error D of the weight."""
    assert m.statistic is not None
    return float((error @ m.statistic.double() * error).sum())


def by_the_paper(m: Matrix, lost: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """``(scaling * B A, B)`` with the symmetric root and its inverse."""
    assert m.statistic is not None
    moments = m.statistic.double()
    values, vectors = torch.linalg.eigh(moments.diagonal().diag() if approximate else moments)
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0)
    u, s, vh = torch.linalg.svd(lost @ (vectors * roots) @ vectors.T, full_matrices=False)
    b, a = u[:, :RANK] * s[:RANK], vh[:RANK] @ (vectors * inverse) @ vectors.T
    return b @ a, b / m.scaling


SHAPES = pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (64, 48), (40, 200)])


@SHAPES
@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("approximate", [False, True])
def test_the_factors_are_those_of_the_paper(outputs: int, inputs: int, input_first: bool, approximate: bool) -> None:
    """The product weighted by the inputs, and B up to the signs of its columns. Beside an input a thousand times as
    large as the others, fp32 resolves 6e-8 times a thousand of these.
    """
    m = matrix(outputs, inputs, input_first=input_first)
    d = QERA(approximate=approximate, oversampling=WHOLE).decompose(m, NF4())
    lost, added = errors(m, d)
    expected, b = by_the_paper(m, lost, approximate)
    assert output_error(m, added - expected) <= 1e-6 * output_error(m, lost - expected)
    ours = d.factors.right.T.double() if input_first else d.factors.left.double()
    torch.testing.assert_close(ours.abs(), b.abs(), rtol=0, atol=1e-3 * float(b.abs().max()))


@SHAPES
@pytest.mark.parametrize("tokens", [4000, 20], ids=["regular", "singular"])
def test_no_other_correction_of_that_rank_errs_less(outputs: int, inputs: int, tokens: int) -> None:
    """Nor do corrections beside it, LoftQ's and plain PiSSA's, also with fewer tokens than inputs. The bound for
    the optimum is the sum of the eigenvalues of ``E R E^T`` beyond the r largest.
    """
    m = matrix(outputs, inputs, tokens=tokens)
    d = QERA(oversampling=WHOLE).decompose(m, NF4())
    lost, added = errors(m, d)
    assert m.statistic is not None
    squares = torch.linalg.eigvalsh(lost @ m.statistic.double() @ lost.T)
    best = output_error(m, lost - added)
    assert best == pytest.approx(float(squares[:-RANK].sum()), rel=1e-4)
    left, right = d.factors.left.double(), d.factors.right.double()
    for salt in range(5):
        for step in (1e-2, 1e-1):
            b = left + step * left.abs().mean() * gaussian(outputs, RANK, 10 + salt)
            a = right + step * right.abs().mean() * gaussian(RANK, inputs, 20 + salt)
            assert output_error(m, lost - m.scaling * b @ a) > best
    for other in (LoRA(), LoftQ(), LoftQ(quantization_iterations=5), PiSSA(), QERA(approximate=True)):
        theirs = other.decompose(m, NF4())
        assert output_error(m, torch.sub(*errors(m, theirs))) > best


def test_uncorrelated_inputs_make_both_forms_equal() -> None:
    m = matrix(48, 64, statistic=torch.linspace(0.5, 2, 64).diag())
    exact, approximate = (QERA(approximate=flag, oversampling=WHOLE).decompose(m, NF4()) for flag in (False, True))
    torch.testing.assert_close(errors(m, exact)[1], errors(m, approximate)[1], rtol=0, atol=1e-6)


def test_the_weight_is_quantized_as_it_is_and_the_factors_are_rounded() -> None:
    m = matrix(48, 64, factor_dtype=torch.bfloat16)
    d = QERA().decompose(m, NF4())
    assert torch.equal(d.residual.decoded, NF4().encode(m.block, m.partition, SINGLE).decoded)
    assert d.ended_on == "decompose"
    assert d.encoded_from is not None
    assert float(d.encoded_from.left.abs().max()) == float(d.encoded_from.right.abs().max()) == 0
    for factor in (d.factors.left, d.factors.right):
        assert torch.equal(factor, factor.to(torch.bfloat16).float())


def test_a_dense_residual_is_refused() -> None:
    with pytest.raises(InputError, match=r"QERA corrects a quantization error.*pass quantization=NF4\(\)"):
        QERA().check(Dense(dtype=torch.float32))
