"""Digests of sharded tensors: against the formula in Python's integers, however they are cut, for every change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage
from lowrank_dist.linalg import seed_from_name
from lowrank_dist.storage.digest import digest_sums, digests

SINGLE = ShardGroup.single()
DTYPES = [torch.uint8, torch.bfloat16, torch.float32]


def splitmix(index: int) -> int:
    z = index * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def by_formula(name: str, data: bytes) -> str:
    padded, halves = data + bytes(-len(data) % 4), []
    words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in range(0, len(padded), 4)]
    for k in range(2):
        salt = seed_from_name(name, k)
        total = splitmix(salt - len(data))
        for i, word in enumerate(words):
            block, position = divmod(i, 2048)
            total += (splitmix(salt + block) | 1) * (splitmix(position) | 1) * word
        halves.append(f"{total % 2**64:016x}")
    return "".join(halves)


def noise(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    data = torch.randint(0, 256, (numel * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype)


def digest(*tensors: tuple[str, Tensor]) -> str:
    storages = {n: FlatStorage(numel=t.numel(), shard_numel=t.numel(), dtype=t.dtype) for n, t in tensors}
    return digests([digest_sums(dict(tensors), storages, 0)], SINGLE)[0]


@pytest.mark.parametrize("numel", [1, 6, 8191, 8192, 280_001])
def test_the_formula(numel: int) -> None:
    data = noise(numel, torch.uint8)
    assert digest(("w", data)) == by_formula("w", bytes(data.tolist()))


@settings(max_examples=60)
@given(
    numel=st.integers(1, 400_000),
    ranks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from([1, 7, 64]),
)
def test_it_does_not_depend_on_the_cut(numel: int, ranks: int, dtype: torch.dtype, rounding: int) -> None:
    """Shards of any length, the last ones padded with anything, some of padding only."""
    whole = noise(numel, dtype)
    expected = digest(("w", whole), ("v", whole[:1]))
    shard = -(-numel // (ranks * rounding)) * rounding
    total = torch.zeros(2, dtype=torch.int64)
    for rank in range(ranks):
        mine = noise(shard, dtype, seed=rank + 1)
        part = whole[rank * shard : (rank + 1) * shard]
        mine[: len(part)] = part
        storages = {
            "w": FlatStorage(numel=numel, shard_numel=shard, dtype=dtype),
            "v": FlatStorage(numel=1, shard_numel=1, dtype=dtype),
        }
        total += digest_sums({"w": mine, "v": whole[:1].clone()}, storages, rank)
    assert digests([total], SINGLE) == [expected]


@settings(max_examples=60)
@given(numel=st.integers(1, 300_000), dtype=st.sampled_from(DTYPES), data=st.data())
def test_every_bit_counts(numel: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """A bit anywhere, or two: of the highest bits of two words, a sum modulo 2^64 must lose nothing."""
    whole = noise(numel, dtype)
    before, values = digest(("w", whole)), whole.view(torch.uint8)
    places = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=2, unique=True))
    for place in places:
        values[place] ^= 1 << data.draw(st.sampled_from([0, 4, 7]))
    assert digest(("w", whole)) != before


def test_names_and_lengths_count() -> None:
    zeros = torch.zeros(5, dtype=torch.uint8)
    found = [
        digest(("w", zeros)),
        digest(("w", zeros[:4])),
        digest(("v", zeros)),
        digest(("v", zeros), ("w", zeros)),
        digest(("v", zeros + 1), ("w", zeros)),
        digest(("v", zeros), ("w", zeros + 1)),
    ]
    assert len(set(found)) == len(found)
    assert digest(("w", zeros), ("v", zeros)) == found[3]


def test_swapped_blocks_are_found() -> None:
    blocks = noise(3 * 2048, torch.float32).view(3, 2048)
    found = {digest(("w", blocks[list(order)].flatten())) for order in [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)]}
    assert len(found) == 4


def test_no_tensors_no_digests() -> None:
    assert digests([], SINGLE) == []
