"""PEFT's layout of the factors that the experts of one stacked parameter share; nothing else in the project knows it.

A is ``[experts * r, in]``, one expert after the other. B is ``[out, r * experts]`` with the experts interleaved: column
``j * experts + e`` is direction j of expert e.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition


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
            put_factor(self.shards[name], start, whole, expert, self._experts, interleaved=name == "lora_B")

    def copy(self) -> StackedFactors:
        """The same, to be filled apart from it."""
        other = StackedFactors(self._shapes, self._experts, self._group, self._dtype)
        other.shards = {name: shard.clone() for name, shard in self.shards.items()}
        return other


def put_factor(shard: Tensor, start: int, factor: Tensor, expert: int, experts: int, *, interleaved: bool) -> None:
    """Copy what belongs there of one expert's factor into a flat shard of the factor of all experts.

    Parameters
    ----------
    shard
        Elements ``start : start + len(shard)`` of ``[experts * r, in]``, or ``[out, r * experts]`` with `interleaved`.
    start
        Its first element.
    factor
        Flat A of the expert, or B with `interleaved`.
    expert, experts
        Which, of how many.
    interleaved
        Experts alternate element by element (B).
    """
    stop = start + len(shard)
    if interleaved:
        first, last = (min(max(-(-(bound - expert) // experts), 0), len(factor)) for bound in (start, stop))
        if first < last:
            shard[first * experts + expert - start :: experts][: last - first] = factor[first:last]
        return
    offset = expert * len(factor)
    first, last = max(start, offset), min(stop, offset + len(factor))
    if first < last:
        shard[first - start : last - start] = factor[first - offset : last - offset]
