"""The decoding of block formats as one operator in the graphs of ``torch.compile``, which does not look inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.format import Product


def decode_in_graph(
    residual: BlockFormat,
    stored: Mapping[str, Tensor],
    partition: RowPartition,
    dtype: torch.dtype,
    product: Product | None,
) -> Tensor:
    """`BlockFormat.decode` as one operator."""
    packed, absmax, nested = (stored.get(f"weight_{name}") for name in ("packed", "absmax", "nested"))
    left, right = product or (None, None)
    facts = partition.rows, partition.columns, partition.world_size, residual.block
    weight: Tensor = _decode_opaquely(packed, absmax, nested, left, right, *facts, residual.name, dtype)
    return weight


@torch.library.custom_op(
    "lowrank_dist::decode_blocks",
    mutates_args=(),
    schema=(
        "(Tensor packed, Tensor absmax, Tensor? nested, Tensor? left, Tensor? right, SymInt rows, SymInt columns, "
        "SymInt world_size, SymInt block, str name, ScalarType dtype) -> Tensor"
    ),
)
def _decode_opaquely(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rows: int,
    columns: int,
    world_size: int,
    block: int,
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    from lowrank_dist.quantization.registry import FORMATS

    stored = {"weight_packed": packed, "weight_absmax": absmax}
    if nested is not None:
        stored["weight_nested"] = nested
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=block)
    product = None if left is None or right is None else (left, right)
    return FORMATS[name].of(block, nested=nested is not None).decode_now(stored, partition, dtype, product)


@_decode_opaquely.register_fake
def _shape_of_decoded(packed: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, _, _, _, dtype = args
    return packed.new_empty((rows, columns), dtype=dtype)
