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

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import FoldAdapters, fuse_adapters
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.quantization.nf4 import NF4


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


class _WithoutKernel(NF4):
    """bitsandbytes decodes, a product is added to what it wrote."""

    def decode(self, stored: Any, partition: RowPartition, dtype: torch.dtype, product: Any = None) -> Tensor:
        weight = self.decode_with_bitsandbytes(stored, partition, dtype)
        return weight if product is None else weight.addmm_(*product)


def _frozen(problem: Problem, residual: NF4) -> FrozenLinear:
    rows, columns = problem.weight.shape
    partition, group = RowPartition(rows=rows, columns=columns, world_size=1, block=64), ShardGroup.single()
    frozen = FrozenLinear(partition, residual, compute_dtype=problem.dtype)
    for name, shard in residual.encode(problem.weight.float(), partition, group).shards.items():
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
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    linear.support_avx512bf16_for_cpu = False  # in eval mode, in bf16 and wrong where blocks straddle rows
    return linear.to(problem.weight.device)


def _dense(problem: Problem) -> nn.Module:
    rows, columns = problem.weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight.to(problem.dtype), requires_grad=False)
    return linear


def _ours(residual: NF4, fold: FoldAdapters) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        owner = nn.Module()
        owner.linear = _adapted(problem, _frozen(problem, residual))
        fuse_adapters(owner, fold)
        return owner.linear  # type: ignore[no-any-return]

    return build


VARIANTS: dict[str, Callable[[Problem], nn.Module]] = {
    "ours: bitsandbytes decodes, PEFT's adapter": _ours(_WithoutKernel(double_quant=True), "never"),
    "ours: Triton decodes, PEFT's adapter": _ours(NF4(double_quant=True), "never"),
    "ours: bitsandbytes decodes, adapter folded in": _ours(_WithoutKernel(double_quant=True), "always"),
    "ours: Triton decodes and folds": _ours(NF4(double_quant=True), "always"),
    "bitsandbytes `Linear4bit`, PEFT's adapter": lambda problem: _adapted(problem, _linear4bit(problem)),
    "dense, PEFT's adapter": lambda problem: _adapted(problem, _dense(problem)),
    "dense, no adapter": _dense,
}


def decoded(problem: Problem) -> Tensor:
    """The weight that the NF4 variants stand for, ``[out, in]`` fp32."""
    frozen = _frozen(problem, NF4(double_quant=True))
    return frozen.decode(tuple(frozen.stored()), torch.float32)
