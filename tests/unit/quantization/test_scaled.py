"""Shards of INT8, FP8 and MXFP4 against the owners' quantization of the whole matrix: bytes, not tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401 (registers its operators)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.quantized import FP8 as FP8_WEIGHTS
from helpers.quantized import MXFP4 as MXFP4_WEIGHTS
from helpers.quantized import compressed
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.quantization import FP8, INT8, MXFP4, BlockFormat

SINGLE = ShardGroup.single()

#: Codes and scales of blocks ``[k, block]`` by the owner, and what it decodes them to.
Owner = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def of_bitsandbytes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LLM.int8, each block as a row."""
    codes, maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(blocks)
    decoded = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(codes, maxima)
    return codes, maxima, decoded


def of_compressed_tensors(layout: str, weights: dict[str, Any], codes: str) -> Owner:
    def encode(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tensors, decoded = compressed(layout, weights, torch.float32).encode(blocks)
        return tensors[codes], tensors["weight_scale"], decoded

    return encode


CASES: dict[str, tuple[BlockFormat, Owner]] = {
    "INT8": (INT8(), of_bitsandbytes),
    "INT8 of 256": (INT8(block_size=256), of_bitsandbytes),
    "FP8": (
        FP8(),
        of_compressed_tensors(
            "float-quantized", {**FP8_WEIGHTS, "strategy": "group", "group_size": 128}, codes="weight"
        ),
    ),
    "MXFP4": (MXFP4(), of_compressed_tensors("mxfp4-pack-quantized", MXFP4_WEIGHTS, codes="weight_packed")),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=20)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 99),
    power=st.integers(-20, 20),
)
def test_shards_are_the_bytes_of_the_whole(
    case: str, rows: int, columns: int, world_size: int, seed: int, power: int
) -> None:
    """Also of blocks that are all zero, of ties between two codes, and of padding."""
    fmt, owner = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 2.0**power
    if seed % 3 == 0:  # few values: ties and zeros
        w = (torch.randint(-8, 9, (rows, columns), generator=generator) / 4) * 2.0**power
        w[: rows // 2] = 0
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=fmt.block)
    shards = []
    for rank in range(world_size):
        start, stop = partition.bounds(rank)
        encoded = fmt.encode(w[start:stop], partition, SINGLE)
        assert {n: (s.shard_numel, s.dtype) for n, s in fmt.storages(partition).items()} == {
            n: (t.numel(), t.dtype) for n, t in encoded.shards.items()
        }
        shards.append(encoded.shards)
    stored = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % fmt.block)).view(-1, fmt.block)
    codes, scales, expected = owner(blocks.clone())
    assert torch.equal(
        stored["weight_packed"].view(codes.dtype)[: codes.numel()].view(torch.uint8), codes.flatten().view(torch.uint8)
    )
    assert torch.equal(stored["weight_absmax"].view(scales.dtype)[: scales.numel()], scales.flatten())
    decoded = fmt.decode(stored, partition, torch.float32)
    assert torch.equal(decoded, expected.float().flatten()[: w.numel()].view(rows, columns))
    assert torch.equal(fmt.decode(stored, partition, torch.bfloat16), decoded.bfloat16())


def test_a_large_matrix_is_decoded_some_blocks_at_a_time() -> None:
    for fmt, _ in CASES.values():
        partition = RowPartition(rows=1100, columns=1024, world_size=1, block=fmt.block)
        encoded = fmt.encode(torch.randn(1100, 1024), partition, SINGLE)
        parts = [encoded.rows(slice(start, start + 100)) for start in range(0, 1100, 100)]
        assert torch.equal(fmt.decode(encoded.shards, partition, torch.float32), torch.cat(parts))


def test_unknown_block_size_is_refused() -> None:
    for fmt in (INT8, FP8):
        with pytest.raises(InputError, match=f"{fmt.__name__}: block_size=63 is not one of"):
            fmt(block_size=63)
