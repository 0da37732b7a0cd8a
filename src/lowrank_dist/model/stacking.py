"""PEFT's layout of the factors that the experts of one stacked parameter share; nothing else in the project knows it.

The factors of one expert are A ``[r, in]`` and B ``[out, r]``. Of `experts` of them PEFT keeps two parameters:

- A ``[experts * r, in]``, one expert after the other: row ``e * r + j`` is direction j of expert e;
- B ``[out, r * experts]``, the experts interleaved: column ``j * experts + e`` is direction j of expert e.

Factors that belong to one matrix alone are the case of one expert. Factors are called ``lora_A`` and ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition


def stacked_shapes(of_one: Mapping[str, tuple[int, int]], experts: int) -> dict[str, tuple[int, int]]:
    """Shapes of A and B of all experts, from those of one: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``."""
    (rank, inputs), (outputs, _) = of_one["lora_A"], of_one["lora_B"]
    return {"lora_A": (experts * rank, inputs), "lora_B": (outputs, rank * experts)}


def split_a(a: Tensor, experts: int) -> Tensor:
    """``[experts, r, in]``, a view of A ``[experts * r, in]``."""
    return a.view(experts, -1, a.shape[1])


def split_b(b: Tensor, experts: int) -> Tensor:
    """``[experts, out, r]``, a view of B ``[out, r * experts]``."""
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def join_a(each: Iterable[Tensor]) -> Tensor:
    """A ``[experts * r, in]`` from the ``[r, in]`` of every expert: what `split_a` takes apart."""
    return torch.cat(tuple(each))


def join_b(each: Iterable[Tensor]) -> Tensor:
    """B ``[out, r * experts]`` from the ``[out, r]`` of every expert: what `split_b` takes apart."""
    return torch.stack(tuple(each), dim=2).flatten(1)


def concat_a(parts: Sequence[Tensor], experts: int) -> Tensor:
    """A of a sum of LoRAs, ``[A; A'; ...]`` for every expert, from the A ``[experts * r, in]`` of each."""
    return torch.cat([split_a(part, experts) for part in parts], dim=1).flatten(0, 1)


def concat_b(parts: Sequence[Tensor]) -> Tensor:
    """B of a sum of LoRAs, ``[B | B' | ...]`` for every expert, from the B ``[out, r * experts]`` of each."""
    return torch.cat(tuple(parts), dim=1)  # directions are the slower index of a column: experts stay interleaved


def positions(factor: str, numel: int, expert: int, experts: int) -> range:
    """Where the elements of one expert's factor stand in the flattened factor of all experts.

    Parameters
    ----------
    factor
        ``lora_A`` or ``lora_B``.
    numel
        Elements of the factor of one expert.
    expert, experts
        Which, of how many.

    Returns
    -------
    range
        Element i of the flattened factor of the expert is element ``positions(...)[i]`` of that of all: consecutive in
        A, every `experts`-th in B.
    """
    if factor == "lora_A":
        return range(expert * numel, (expert + 1) * numel)
    return range(expert, numel * experts, experts)


def put_factor(shard: Tensor, start: int, factor: Tensor, where: range) -> None:
    """Copy what belongs there of one expert's factor into a flat shard of the factor of all experts.

    Parameters
    ----------
    shard
        Elements ``start : start + len(shard)`` of the flattened factor of all experts.
    start
        Its first element.
    factor
        The flattened factor of the expert.
    where
        Its `positions`.
    """
    bounds = (start, start + len(shard))
    first, last = (min(max(-((where.start - bound) // where.step), 0), len(where)) for bound in bounds)
    if first < last:
        shard[where[first] - start :: where.step][: last - first] = factor[first:last]


class FactorReader:
    """Reads factors of single experts where those of all are stored together, and what experts share only once.

    The elements of one expert's B lie among those of all others: what was read for one is kept for the next, until
    another tensor or another part of it is asked for.
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
            self._kept = None  # not two at a time
            self._kept = part, flat(*part)
        return self._kept[1][where.start - first :: where.step].clone()

    def clear(self) -> None:
        """Keep nothing."""
        self._kept = None


class StackedFactors:
    """This rank's flat shards of the factors that all experts of one parameter share, filled expert by expert.

    Parameters
    ----------
    shapes
        Of the factors of one expert, by name: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``.
    experts
        How many there are.
    group
        The ranks that share them.
    dtype
        Of the shards.

    Attributes
    ----------
    shards
        By name; evenly cut, without padding.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], experts: int, group: ShardGroup, dtype: torch.dtype
    ) -> None:
        self.shards: dict[str, Tensor] = {}
        self._shapes, self._experts, self._group, self._dtype = shapes, experts, group, dtype

    def bounds(self, name: str) -> tuple[int, int]:
        """First and last element of this rank's shard of a factor of all experts."""
        numel = torch.Size(self._shapes[name]).numel() * self._experts
        return FlatPartition(numel=numel, world_size=self._group.size).bounds(self._group.rank)

    def put(self, expert: int, factors: Mapping[str, Tensor]) -> None:
        """Put this rank's flat shards, maybe padded, of one expert's factors in. One all-gather of each."""
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
        """The same, to be filled apart from it."""
        other = StackedFactors(self._shapes, self._experts, self._group, self._dtype)
        other.shards = {name: shard.clone() for name, shard in self.shards.items()}
        return other
