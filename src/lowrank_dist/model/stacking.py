"""PEFT's layout of the factors of a stack of experts; only this module depends on it.

The factors of one expert are A ``[r, in]`` and B ``[out, r]``. PEFT keeps those of all `experts` in two parameters:

- A ``[experts * r, in]``, expert by expert: row ``e * r + j`` is direction j of expert e;
- B ``[out, r * experts]``, experts interleaved: column ``j * experts + e`` is direction j of expert e.

Factors of a single matrix are the case ``experts == 1``. Factors are called ``lora_A`` and ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition


def stacked_shapes(of_one: Mapping[str, tuple[int, int]], experts: int) -> dict[str, tuple[int, int]]:
    """Shapes of A and B of all experts, from the shapes of one: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``."""
    (rank, inputs), (outputs, _) = of_one["lora_A"], of_one["lora_B"]
    return {"lora_A": (experts * rank, inputs), "lora_B": (outputs, rank * experts)}


def split_a(a: Tensor, experts: int) -> Tensor:
    """``[experts, r, in]``, a view of A ``[experts * r, in]``."""
    return a.view(experts, -1, a.shape[1])


def split_b(b: Tensor, experts: int) -> Tensor:
    """``[experts, out, r]``, a view of B ``[out, r * experts]``."""
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def join_a(each: Iterable[Tensor]) -> Tensor:
    """A ``[experts * r, in]`` from the ``[r, in]`` of every expert; the inverse of `split_a`."""
    return torch.cat(tuple(each))


def join_b(each: Iterable[Tensor]) -> Tensor:
    """B ``[out, r * experts]`` from the ``[out, r]`` of every expert; the inverse of `split_b`."""
    return torch.stack(tuple(each), dim=2).flatten(1)


def concat_a(parts: Sequence[Tensor], experts: int) -> Tensor:
    """A of a sum of LoRAs, ``[A; A'; ...]`` for every expert, from the A ``[experts * r, in]`` of each."""
    return torch.cat([split_a(part, experts) for part in parts], dim=1).flatten(0, 1)


def concat_b(parts: Sequence[Tensor]) -> Tensor:
    """B of a sum of LoRAs, ``[B | B' | ...]`` for every expert, from the B ``[out, r * experts]`` of each."""
    return torch.cat(tuple(parts), dim=1)  # directions are the slower index of a column: experts stay interleaved


def positions(factor: str, numel: int, expert: int, experts: int) -> range:
    """Positions of the elements of one expert's factor in the flattened factor of all experts.

    Parameters
    ----------
    factor
        ``lora_A`` or ``lora_B``.
    numel
        Number of elements of the factor of one expert.
    expert, experts
        Index of the expert, and number of experts.

    Returns
    -------
    range
        Element i of the expert's flattened factor is element ``positions(...)[i]`` of the flattened factor of all
        experts: consecutive in A, every `experts`-th in B.
    """
    if factor == "lora_A":
        return range(expert * numel, (expert + 1) * numel)
    return range(expert, numel * experts, experts)


def put_factor(shard: Tensor, start: int, factor: Tensor, where: range) -> None:
    """Copy the elements of one expert's factor that lie in a flat shard of the factor of all experts into it.

    Parameters
    ----------
    shard
        Elements ``start : start + len(shard)`` of the flattened factor of all experts.
    start
        Index of the first element of `shard`.
    factor
        The flattened factor of the expert.
    where
        The `positions` of `factor`.
    """
    bounds = (start, start + len(shard))
    first, last = (min(max(-((where.start - bound) // where.step), 0), len(where)) for bound in bounds)
    if first < last:
        shard[where[first] - start :: where.step][: last - first] = factor[first:last]


class FactorReader:
    """Reads factors of single experts from tensors of all experts, each byte once.

    B interleaves the experts, so the range that is read for one expert also holds the elements of the others. It is
    kept for them until another tensor or another range is read.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, int, int], Tensor] | None = None

    def read(self, flat: Callable[[str, int, int], Tensor], name: str, where: range) -> Tensor:
        """Elements `where`, a slice of `positions`, of the flattened tensor `name`.

        Parameters
        ----------
        flat
            Reads elements ``start:stop`` of a flattened tensor, given its name, start and stop.
        """
        if where.step == 1:
            return flat(name, where.start, where.stop)
        first = where.start - where.start % where.step
        part = (name, first, first + len(where) * where.step)
        if self._kept is None or self._kept[0] != part:
            self._kept = None  # frees it before the next is read
            self._kept = part, flat(*part)
        return self._kept[1][where.start - first :: where.step].clone()

    def clear(self) -> None:
        """Free the range that is kept."""
        self._kept = None


class StackedFactors:
    """This rank's flat shards of the factors of all experts of one parameter, filled expert by expert.

    Parameters
    ----------
    shapes
        Shapes of the factors of one expert, by name: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``.
    experts
        Number of experts.
    group
        The ranks that hold the shards.
    dtype
        Dtype of the shards.

    Attributes
    ----------
    shards
        Flat shards by name of the factor: evenly sharded, without padding.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], experts: int, group: ShardGroup, dtype: torch.dtype
    ) -> None:
        self.shards: dict[str, Tensor] = {}
        self._shapes, self._experts, self._group, self._dtype = shapes, experts, group, dtype

    def bounds(self, name: str) -> tuple[int, int]:
        """Bounds ``(start, stop)`` of this rank's shard of a factor of all experts."""
        numel = torch.Size(self._shapes[name]).numel() * self._experts
        return FlatPartition(numel=numel, world_size=self._group.size).bounds(self._group.rank)

    def put(self, expert: int, factors: Mapping[str, Tensor]) -> None:
        """Add an expert, from this rank's flat, possibly padded shards of its factors. One all-gather of each."""
        for name, shard in factors.items():
            one = FlatPartition(numel=torch.Size(self._shapes[name]).numel(), world_size=self._group.size)
            padded = shard.new_zeros(one.shard_numel)
            padded[: shard.numel()] = shard
            whole = self._group.gather_equal(padded)[: one.numel]
            start, stop = self.bounds(name)
            if name not in self.shards:
                self.shards[name] = torch.zeros(stop - start, dtype=self._dtype, device=shard.device)
            put_factor(self.shards[name], start, whole, positions(name, one.numel, expert, self._experts))

    def copy(self) -> StackedFactors:
        """An independent copy."""
        other = StackedFactors(self._shapes, self._experts, self._group, self._dtype)
        other.shards = {name: shard.clone() for name, shard in self.shards.items()}
        return other
