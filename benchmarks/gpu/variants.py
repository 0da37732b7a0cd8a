"""One adapted linear layer, computed in several ways: those that could be shipped, and those to compare with.

All have ``x [tokens, in]`` in and ``y [tokens, out]`` out, and give gradients to x, A ``[r, in]`` and B ``[out, r]``:
``y = x (W + s B A)^T`` with W frozen, dense or decoded from NF4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lowrank_dist.comm import ShardGroup
from lowrank_dist.layers import FrozenLinear
from lowrank_dist.nf4 import NF4
from lowrank_dist.partition import RowPartition


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer to compute.

    Attributes
    ----------
    weight
        ``[out, in]`` in `dtype`, on the device of the measurement.
    a, b
        ``[r, in]`` and ``[out, r]`` fp32.
    dtype
        Of the arithmetic.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    dtype: torch.dtype


class Folded(nn.Module):
    """The adapter added to the decoded weight, so that one product does both; decoded and added again in backward.

    ``2 r out in`` flops for each of the two additions instead of ``2 r (out + in) tokens`` for the adapter's own way
    through forward and backward to x; and y is written once.
    """

    def __init__(self, frozen: FrozenLinear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.frozen, self.a, self.b = frozen, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return _Folded.apply(x, self.a, self.b, self.frozen, *self.frozen.stored())


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, frozen: FrozenLinear, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b, *stored)
        ctx.frozen = frozen
        return x @ _sum(frozen, stored, a, b, x.dtype).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, *stored = ctx.saved_tensors
        to_x = grad @ _sum(ctx.frozen, tuple(stored), a, b, grad.dtype)
        to_a = ((grad @ b.to(grad.dtype)).mT @ x).to(a.dtype)
        to_b = (grad.mT @ (x @ a.to(x.dtype).mT)).to(b.dtype)
        return to_x, to_a, to_b, None, *(None for _ in stored)


def _sum(frozen: FrozenLinear, stored: tuple[Tensor, ...], a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return frozen.decode(stored, dtype).addmm_(b.to(dtype), a.to(dtype))


def _frozen(problem: Problem) -> FrozenLinear:
    rows, columns = problem.weight.shape
    partition, group = RowPartition(rows=rows, columns=columns, world_size=1, block=64), ShardGroup.single()
    frozen = FrozenLinear(partition, NF4(), compute_dtype=problem.dtype)
    for name, shard in NF4().encode(problem.weight.float(), partition, group).shards.items():
        setattr(frozen, name, nn.Parameter(shard, requires_grad=False))
    return frozen


def _adapted(problem: Problem, base: nn.Module) -> nn.Module:
    """PEFT's LoRA layer over `base`."""
    owner = nn.Module()
    owner.linear = base
    owner.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    rank, (rows, columns) = len(problem.a), problem.weight.shape
    if isinstance(base, FrozenLinear):
        owner.linear = nn.Linear(columns, rows, bias=False, device="meta")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]), owner)
    layer = owner.linear
    if isinstance(base, FrozenLinear):
        layer.base_layer = base
    layer.lora_A["default"].weight = nn.Parameter(problem.a.to(problem.dtype))
    layer.lora_B["default"].weight = nn.Parameter(problem.b.to(problem.dtype))
    return layer  # type: ignore[no-any-return]


def _linear4bit(problem: Problem) -> nn.Module:
    rows, columns = problem.weight.shape
    linear = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=problem.dtype, quant_type="nf4")
    weight = problem.weight.to("cpu", problem.dtype)
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    return linear.to(problem.weight.device)


def _dense(problem: Problem) -> nn.Module:
    rows, columns = problem.weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight.to(problem.dtype), requires_grad=False)
    return linear


VARIANTS: dict[str, Callable[[Problem], nn.Module]] = {
    "ours: NF4, PEFT's adapter": lambda problem: _adapted(problem, _frozen(problem)),
    "NF4, adapter folded in": lambda problem: Folded(_frozen(problem), problem.a, problem.b),
    "bitsandbytes `Linear4bit`, PEFT's adapter": lambda problem: _adapted(problem, _linear4bit(problem)),
    "dense, PEFT's adapter": lambda problem: _adapted(problem, _dense(problem)),
    "dense, no adapter": _dense,
}


def decoded(problem: Problem) -> Tensor:
    """The weight that the NF4 variants stand for, ``[out, in]`` fp32."""
    frozen = _frozen(problem)
    return frozen.decode(tuple(frozen.stored()), torch.float32)
