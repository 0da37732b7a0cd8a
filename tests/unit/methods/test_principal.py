"""What every initialisation promises of step 0, in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist import NF4, LoftQ, LoRA, PiSSA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.methods import Decomposition, Matrix
from lowrank_dist.quantization.dense import Dense

SINGLE = ShardGroup.single()


def matrix(rows: int = 96, columns: int = 64, rank: int = 8, **options: Any) -> Matrix:
    generator = torch.Generator().manual_seed(rows + columns)
    scale = torch.arange(1, columns + 1) ** -0.5
    defaults = {"scaling": 1.0, "input_first": False, "factor_dtype": torch.float32}
    return Matrix(
        name="w",
        block=torch.randn(rows, columns, generator=generator) * scale,
        partition=RowPartition(rows=rows, columns=columns, world_size=1, block=64),
        group=SINGLE,
        rank=rank,
        **{**defaults, **options},
    )


def computed(m: Matrix, d: Decomposition) -> Tensor:
    """The matrix that the model multiplies with at step 0."""
    return d.residual.decoded + m.scaling * d.factors.left @ d.factors.right


def error(m: Matrix, d: Decomposition) -> float:
    return float((m.block - computed(m, d)).norm())


@settings(max_examples=20)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    scaling=st.sampled_from([0.25, 1.0, 2.0, 1 / math.sqrt(3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    method=st.sampled_from([PiSSA(), PiSSA(power_iterations=0), LoRA()]),
)
def test_without_quantization_nothing_is_lost(
    rows: int, columns: int, scaling: float, dtype: torch.dtype, method: Any
) -> None:
    """Also with bf16 factors: they are rounded before the residual is formed."""
    m = matrix(rows, columns, rank=min(rows, columns, 4), scaling=scaling, factor_dtype=dtype)
    d = method.decompose(m, Dense(dtype=torch.float32))
    torch.testing.assert_close(computed(m, d), m.block, rtol=1e-5, atol=1e-5)
    assert torch.equal(d.factors.left, d.factors.left.to(dtype).float())
    assert torch.equal(d.factors.right, d.factors.right.to(dtype).float())


def test_pissa_factors_are_the_principal_triplets() -> None:
    m = matrix(scaling=0.5)
    d = PiSSA(power_iterations=40).decompose(m, Dense(dtype=torch.float32))
    u, s, vh = torch.linalg.svd(m.block.double())
    best = (u[:, :8] * s[:8]) @ vh[:8]
    torch.testing.assert_close((m.scaling * d.factors.left @ d.factors.right).double(), best, rtol=0, atol=1e-4)
    # both factors carry sqrt(S / scaling): equal norms, column by column
    torch.testing.assert_close(d.factors.left.norm(dim=0), d.factors.right.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [PiSSA, LoftQ])
def test_alternating_shrinks_the_error(method: Any) -> None:
    m = matrix(256, 192, rank=16)
    plain = error(m, LoRA().decompose(m, NF4()))
    errors = [error(m, method(quantization_iterations=t).decompose(m, NF4())) for t in (1, 2, 5)]
    assert plain > errors[0] > errors[1] > errors[2]


def test_qlora_computes_the_quantized_weight() -> None:
    m = matrix()
    d = LoRA().decompose(m, NF4())
    assert torch.equal(computed(m, d), NF4().encode(m.block, m.partition, SINGLE).decoded)


def test_loftq_starts_from_the_quantized_weight() -> None:
    """T = 1: Q is NF4 of W itself, and B A the best rank-r approximation of what it lost."""
    m = matrix()
    d = LoftQ(power_iterations=12).decompose(m, NF4())
    quantized = NF4().encode(m.block, m.partition, SINGLE).decoded
    assert torch.equal(d.residual.decoded, quantized)
    tail = torch.linalg.svdvals((m.block - quantized).double())[8:].norm()
    assert error(m, d) == pytest.approx(float(tail), rel=1e-3)


@pytest.mark.parametrize("input_first", [False, True])
def test_lora_starts_as_pefts_does(input_first: bool) -> None:
    """A uniform in +-1/sqrt(in), B zero, whichever way the weight is stored."""
    m = matrix(96, 64, input_first=input_first)
    factors = LoRA().decompose(m, Dense(dtype=torch.float32)).factors
    a, b = (factors.left, factors.right) if input_first else (factors.right, factors.left)
    inputs = 96 if input_first else 64
    assert b.abs().max() == 0
    assert a.abs().max() <= 1 / math.sqrt(inputs)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)


def test_seeds_change_the_draw_and_nothing_else_does() -> None:
    one, same, other = (LoRA(seed=s).decompose(matrix(), NF4()).factors.right for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_seed_everything_is_the_seed_of_what_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert LoRA() == LoRA(seed=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert LoRA() == LoRA(seed=7)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: PiSSA(quantization_iterations=0), "quantization_iterations=0 must be at least 1"),
        (lambda: LoftQ(quantization_iterations=0), "quantization_iterations=0 must be at least 1"),
        (lambda: PiSSA(power_iterations=-1), "power_iterations=-1 must not be negative"),
        (lambda: PiSSA(oversampling=-1), "oversampling=-1 must not be negative"),
        (lambda: LoftQ().check(Dense(dtype=torch.float32)), "pass quantization=NF4()"),
        (lambda: PiSSA(quantization_iterations=5).check(Dense(dtype=torch.float32)), "pass quantization=NF4()"),
    ],
)
def test_senseless_options_are_refused(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")):
        build()
