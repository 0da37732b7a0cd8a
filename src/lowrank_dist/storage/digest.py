"""A 128-bit digest of a sharded tensor that does not depend on the sharding; every rank sums its own bytes.

The bytes of a tensor are read as 32-bit numbers ``w[b, o]``, 2048 of them to a block b. With odd 64-bit weights c and m
from a generator, the two halves of the digest are ::

    sum_b m[k, b] (sum_o c[o] w[b, o])  modulo 2^64,  k = 0, 1.

Such a sum is linear in the bytes: each rank adds its part of a word, and the sums of all ranks add up. One differing
word always changes it, because an odd number is invertible modulo 2^64 and words are shorter. Several differing words
leave it unchanged with probability at most 2^-33 for random weights ([LK], theorem 3.1), and usually 2^-64. The digest
detects accidents, not forgeries.

References
----------
.. [LK] D. Lemire, O. Kaser, "Strongly universal string hashing is fast", The Computer Journal 57 (2014);
   arXiv:1202.4961.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage
from lowrank_dist.linalg import seed_from_name

_WORD = 4  # bytes
_BLOCK = 2048  # words
# bytes that are widened at a time: on a CPU as many per thread as a core's cache holds, else enough to fill a device
_PIECE, _LARGE_PIECE = 2**18, 2**25


def digest_sums(shards: Mapping[str, Tensor], storages: Mapping[str, FlatStorage], rank: int) -> Tensor:
    """This rank's part of the digest of tensors that are sharded according to `storages`.

    Parameters
    ----------
    shards
        Flat shards of `rank` by name; each is one part, in rank order, of a tensor. Padding does not count.
    storages
        Lengths and dtypes of the tensors and their shards.
    rank
        The rank that the shards belong to.

    Returns
    -------
    Tensor
        ``[2]`` int64 on the device of the shards, to be summed over all ranks. Nothing is communicated.
    """
    device = next(iter(shards.values())).device
    total = torch.zeros(2, dtype=torch.int64, device=device)
    for name, storage in storages.items():
        size, start = storage.dtype.itemsize, rank * storage.shard_numel
        stop = min(start + storage.shard_numel, storage.numel)
        if start < stop:
            total += _sums(name, shards[name][: stop - start].view(torch.uint8), start * size)
        if rank == 0:
            total += _splitmix(_salts(name).to(device) - storage.numel * size)
    return total


def piece_sums(label: str, values: Tensor, start: int) -> list[int]:
    """The sums of a piece of the tensor `label`, as numbers below 2^64; those of all its pieces add up.

    Parameters
    ----------
    label
        Name, dtype and shape of the tensor: sums of tensors with other labels have nothing in common.
    values
        Flat; elements of the tensor from `start` on.
    start
        First element.
    """
    if values.numel() == 0:
        return [0, 0]
    data = values.contiguous().view(torch.uint8)
    return [int(half) % 2**64 for half in _sums(label, data, start * values.dtype.itemsize).tolist()]


def digest_of_pieces(label: str, sums: Sequence[int], nbytes: int) -> str:
    """Digest of the tensor `label` of `nbytes` bytes from the sums of all its pieces."""
    ends = _splitmix(_salts(label) - nbytes).tolist()
    return "".join(f"{(half + end) % 2**64:016x}" for half, end in zip(sums, ends, strict=True))


def digests(sums: Sequence[Tensor], group: ShardGroup) -> list[str]:
    """Digests of tensors, 32 hexadecimal digits each, from `digest_sums` of all ranks. One all-reduce for all."""
    if not sums:
        return []
    halves = group.sum(torch.stack(list(sums))).tolist()
    return ["".join(f"{half % 2**64:016x}" for half in pair) for pair in halves]


def _sums(name: str, data: Tensor, start: int) -> Tensor:
    """Both sums of the bytes `data`, the first of which is byte `start` of the tensor `name`."""
    device, width, stop = data.device, _BLOCK * _WORD, start + data.numel()
    first, last = start // width, -(-stop // width)  # blocks
    inner = torch.empty(last - first, dtype=torch.int64, device=device)
    step = _PIECE * torch.get_num_threads() if device.type == "cpu" else _LARGE_PIECE
    step = min(step // width, last - first)
    piece = torch.zeros(step * width, dtype=torch.uint8, device=device)
    products = torch.empty(step, _BLOCK, dtype=torch.int64, device=device)
    for block in range(first, last, step):
        position = block * width
        low, high = max(position, start), min(position + step * width, stop)
        if high - low < step * width:
            piece.zero_()
        piece[low - position : high - position] = data[low - start : high - start]
        torch.mul(piece.view(torch.int32).view(step, _BLOCK), _inner_weights(device), out=products)
        count = min(step, last - block)
        inner[block - first : block - first + count] = products[:count].sum(1)
    blocks = torch.arange(first, last, device=device)
    return torch.stack([((_splitmix(salt + blocks) | 1) * inner).sum() for salt in _salts(name).to(device)])


def _salts(name: str) -> Tensor:
    """Two seeds, ``[2]`` int64, from the name of a tensor."""
    return torch.tensor([seed_from_name(name, salt) for salt in range(2)])


@cache
def _inner_weights(device: torch.device) -> Tensor:
    return _splitmix(torch.arange(_BLOCK, device=device)) | 1


def _splitmix(index: Tensor) -> Tensor:
    """Numbers ``index`` (int64) of the generator splitmix64; int64 arithmetic wraps."""
    z = index * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """``z >> bits`` of the unsigned number."""
    low: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
    return low


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
