"""Shards of several parameters in one buffer of bytes, which one all-gather brings together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.zero3.partition import local_shard, set_empty, set_whole, whole_shape

ALIGNMENT = 16
"""Bytes to whose multiples the shards of a unit are padded, so that each can be viewed in its dtype."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter's shard lies in a buffer: `length` bytes from `start` on, then `padding`.

    Behind each other, the shards of all ranks are the parameter, of a contiguous `shape`.
    """

    parameter: nn.Parameter
    start: int
    length: int
    padding: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: nn.Parameter, start: int) -> _Place:
        """The place of a parameter that begins at `start`."""
        length, shape = local_shard(parameter).nbytes, whole_shape(parameter)
        stride = torch.empty(shape, device="meta").stride()
        return cls(parameter, start, length, -length % ALIGNMENT, shape, stride)

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.start + self.length + self.padding


@dataclass(eq=False)
class Pack:
    """Shards of parameters that one group of ranks shares, in one buffer; gathered together.

    Attributes
    ----------
    group
        The ranks.
    local
        This rank's shards, flat uint8. Most frozen parameters' shards are views of it: those of the dtype that most
        bytes have. (DeepSpeed's own checkpoints cannot save views of one storage in several dtypes.)
    places
        Where in `local` the shards are.
    copied
        Places in `local` of the other shards, with their parameters; filled before every gather. Trained parameters'
        shards are views of a tensor of DeepSpeed's optimizer.
    users
        Indices of the units that have it gathered.
    lasts
        Whether it stays gathered until `expire`.
    """

    group: ShardGroup
    local: Tensor
    lasts: bool
    places: list[_Place] = field(default_factory=list)
    copied: list[tuple[Tensor, nn.Parameter]] = field(default_factory=list)
    users: set[int] = field(default_factory=set)
    _fresh: bool = False
    _gathered: Tensor | None = None
    _work: Any = None

    def begin(self, device: torch.device) -> None:
        """Start the all-gather, unless it has been started or is done."""
        if self.users or self._fresh or self._gathered is not None:
            return
        for place, parameter in self.copied:
            place.copy_(local_shard(parameter), non_blocking=True)
        self._gathered, self._work = self.group.start_gather(self.local.to(device, non_blocking=True))

    def finish(self, user: int, device: torch.device) -> None:
        """Wait for the all-gather and give the parameters their data."""
        self.begin(device)
        self.users.add(user)
        gathered, ranks = self._gathered, self.group.size
        if gathered is None:  # another unit has it, or it has stayed
            return
        self._fresh = self.lasts
        if self._work is not None:
            self._work.wait()
        self._gathered = self._work = None
        whole = gathered if ranks == 1 else self._put_together(gathered)
        of_dtype: dict[torch.dtype, Tensor] = {}
        for place in self.places:
            dtype = place.parameter.dtype
            if dtype not in of_dtype:
                of_dtype[dtype] = whole.view(dtype)
            # a view at once: slices and views of them cost the host four times as much
            start = ranks * place.start // dtype.itemsize
            set_whole(place.parameter, of_dtype[dtype].as_strided(place.shape, place.stride, start))

    def _put_together(self, gathered: Tensor) -> Tensor:
        """The shards of each parameter behind each other, rank by rank."""
        ranks, whole = self.group.size, torch.empty_like(gathered)
        sizes, parts, start = [], [], 0
        for size in (size for place in self.places for size in (place.length, place.padding) if size):
            sizes.append(size)
            parts.append(whole.as_strided((ranks, size), (size, 1), start))
            start += ranks * size
        torch.split_with_sizes_copy(gathered.view(ranks, -1), sizes, dim=1, out=parts)
        return whole

    def release(self, user: int) -> None:
        """Empty the parameters unless another unit has them, and drop what was gathered ahead."""
        self.users.discard(user)
        if self._work is not None:
            self._work.wait()
        self._gathered = self._work = None
        if not self.users and not self._fresh:
            self._empty()

    def expire(self) -> None:
        """Empty the parameters, whose shards have changed."""
        if self._fresh:
            self._fresh = False
            self._empty()

    def _empty(self) -> None:
        for place in self.places:
            set_empty(place.parameter)


def packed(parameters: Sequence[nn.Parameter], group: ShardGroup, *, lasts: bool) -> Pack:
    """Copy the shards of `parameters` into one buffer, which most frozen parameters use from then on."""
    places: list[_Place] = []
    for parameter in parameters:
        places.append(_Place.of(parameter, places[-1].end if places else 0))
    first = local_shard(parameters[0])
    local = torch.zeros(places[-1].end, dtype=torch.uint8, device=first.device)
    if first.is_pinned():
        local = local.pin_memory()
    pack = Pack(group, local, lasts, places)
    nbytes: Counter[torch.dtype] = Counter()
    for place in places:
        nbytes[place.parameter.dtype] += place.length
    (dtype, _), *_ = nbytes.most_common()
    for place in places:
        shard = local_shard(place.parameter)
        mine = local[place.start : place.start + place.length].view(shard.dtype)
        if place.parameter.requires_grad or shard.dtype != dtype:
            pack.copied.append((mine, place.parameter))
        else:
            mine.copy_(shard)
            shard.data = mine
    return pack
