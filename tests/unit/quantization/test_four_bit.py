"""Shards of NF4 and FP4 against bitsandbytes' quantization of the whole matrix: bytes, not tolerances."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.quantization.four_bit import FourBit
from lowrank_dist.quantization.fp4 import FP4
from lowrank_dist.quantization.nf4 import NF4

SINGLE = ShardGroup.single()

each_table = pytest.mark.parametrize("table", [NF4, FP4])


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_hand(table: type[FourBit], packed: Tensor, absmax: Tensor, rows: int, columns: int) -> Tensor:
    """Dequantization as it is defined: code table times the block's maximum."""
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    values = bnb.get_4bit_type(table.name, device="cpu")[codes].view(-1, 64) * absmax[:, None]
    return values.flatten()[: rows * columns].view(rows, columns)


@each_table
@settings(max_examples=30)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), world_size=st.integers(1, 5), seed=st.integers(0, 99))
def test_shards_are_the_bytes_of_the_whole(
    table: type[FourBit], rows: int, columns: int, world_size: int, seed: int
) -> None:
    w = weight(rows, columns, seed)
    partition = RowPartition(rows=rows, columns=columns, world_size=world_size, block=64)
    shards = []
    for rank in range(world_size):
        start, stop = partition.bounds(rank)
        shards.append(table().encode(w[start:stop], partition, SINGLE).shards)
    stored = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    packed, state = bnb.quantize_4bit(torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)), quant_type=table.name)
    assert torch.equal(stored["weight_packed"][: packed.numel()], packed.flatten())
    absmax = stored["weight_absmax"].view(torch.float32)
    assert torch.equal(absmax[: state.absmax.numel()], state.absmax)
    decoded = table().decode(stored, partition, torch.float32)
    torch.testing.assert_close(decoded, by_hand(table, stored["weight_packed"], absmax, rows, columns), rtol=0, atol=0)


@each_table
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (300, 128), (576, 1536), (37, 36)])
def test_double_quantization_has_bitsandbytes_codes(table: type[FourBit], rows: int, columns: int) -> None:
    """The offset is the mean of all maxima, summed exactly here and in fp32 there (in the device's own order): one unit
    of rounding apart. Given the offset, everything is equal bit for bit.
    """
    w = weight(rows, columns)
    partition = RowPartition(rows=rows, columns=columns, world_size=1, block=64)
    fmt = table(double_quant=True)
    encoded = fmt.encode(w, partition, SINGLE)
    flat = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64))
    packed, absmax = (plain := bnb.quantize_4bit(flat, quant_type=table.name))[0], plain[1].absmax
    offset, *_ = nested = encoded.shards["weight_nested"].view(torch.float32)
    torch.testing.assert_close(offset, absmax.mean(), rtol=2e-7, atol=0)
    codes, second = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(encoded.shards["weight_packed"][: packed.numel()], packed.flatten())
    assert torch.equal(encoded.shards["weight_absmax"][: codes.numel()], codes)
    assert torch.equal(nested[1:], second.absmax)
    restored = bnb.dequantize_blockwise(codes, second) + offset
    assert torch.equal(encoded.decoded, by_hand(table, packed.flatten(), restored, rows, columns))
    assert torch.equal(fmt.decode(encoded.shards, partition, torch.float32), encoded.decoded)


@each_table
@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_stays_zero(table: type[FourBit], double_quant: bool) -> None:
    partition = RowPartition(rows=8, columns=64, world_size=1, block=64)
    encoded = table(double_quant=double_quant).encode(torch.zeros(8, 64), partition, SINGLE)
    assert encoded.decoded.abs().max() == 0


@settings(max_examples=20)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), ranks=st.integers(1, 7), double_quant=st.booleans())
def test_storages_have_the_length_that_is_promised(rows: int, columns: int, ranks: int, double_quant: bool) -> None:
    fmt = NF4(double_quant=double_quant)
    partition = RowPartition(rows=rows, columns=columns, world_size=ranks, block=64)
    storages = fmt.storages(partition)
    start, stop = partition.bounds(0)
    if double_quant and ranks > 1:
        return  # needs the other ranks: tests/distributed
    encoded = fmt.encode(weight(rows, columns)[start:stop], partition, SINGLE)
    assert {n: (s.shard_numel, s.dtype) for n, s in storages.items()} == {
        n: (t.numel(), t.dtype) for n, t in encoded.shards.items()
    }


def test_unknown_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size=63 is not one of"):
        NF4(block_size=63)
