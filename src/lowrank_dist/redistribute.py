"""Sharded tensors cut anew for other ranks, and rows put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank_dist.comm import ShardGroup
from lowrank_dist.partition import RowPartition
from lowrank_dist.residual import Storage


def whole_left(left: Tensor, partition: RowPartition, group: ShardGroup) -> Tensor:
    """Rows of all ranks of a row-sharded factor: ``[m, r]``, replicated. One all-gather."""
    padded = left.new_zeros(partition.rows_per_rank, left.shape[1])
    padded[: left.shape[0]] = left
    return group.gather_equal(padded)[: partition.rows]


def redistribute(
    shards: Sequence[Mapping[str, Tensor]],
    layouts: list[dict[str, tuple[Storage, Storage]]],
    group_size: int,
    group: ShardGroup,
    *,
    kept_by: int | None = None,
) -> list[dict[str, Tensor]]:
    """Cut tensors that parts of the ranks hold anew for all ranks, or for every part of other parts. One all-to-all.

    Parameters
    ----------
    shards
        This rank's flat shards of the tensors of its items: of items ``rank // group_size``, and so on in steps of
        ``P / group_size``, of `layouts`.
    layouts
        For every item and name: the storage over its `group_size` ranks and the one over `kept_by` ranks.
    group_size
        Consecutive ranks that share an item; every such group holds its items alone.
    group
        All ranks.
    kept_by
        So many consecutive ranks each hold all tensors together afterwards; None: all ranks.

    Returns
    -------
    list of dict
        For every item this rank's flat shards over `kept_by` ranks, padding included.
    """
    kept = group.size if kept_by is None else kept_by

    def overlap(source: int, target: int, storages: tuple[Storage, Storage]) -> tuple[int, int]:
        held, wanted = storages
        position, place = source % group_size, target % kept
        start = max(position * held.shard_numel, place * wanted.shard_numel)
        return start, min((position + 1) * held.shard_numel, (place + 1) * wanted.shard_numel, held.numel)

    def items_of(rank: int) -> range:
        return range(rank // group_size, len(layouts), group.size // group_size)

    me = group.rank
    device = next((shard.device for item in shards for shard in item.values()), group.device)
    outgoing: list[list[Tensor]] = []  # views of `shards`, by the rank that gets them
    for target in range(group.size):
        outgoing.append([])
        for item, index in zip(shards, items_of(me), strict=True):
            for name, storages in layouts[index].items():
                start, stop = overlap(me, target, storages)
                first = me % group_size * storages[0].shard_numel
                if start < stop:
                    outgoing[-1].append(item[name][start - first : stop - first].contiguous().view(torch.uint8))

    items = [
        {name: torch.zeros(cut.shard_numel, dtype=cut.dtype, device=device) for name, (_, cut) in layout.items()}
        for layout in layouts
    ]
    incoming: list[list[Tensor]] = []  # views of `items` to fill, in the order in which their ranks send
    for source in range(group.size):
        incoming.append([])
        for index in items_of(source):
            for name, storages in layouts[index].items():
                start, stop = overlap(source, me, storages)
                first = me % kept * storages[1].shard_numel
                if start < stop:
                    incoming[-1].append(items[index][name][start - first : stop - first].view(torch.uint8))
    for view, part in zip(incoming[me], outgoing[me], strict=True):  # what stays here need not be packed
        view.copy_(part)
    incoming[me], outgoing[me] = [], []
    packed = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *(v for views in outgoing for v in views)])
    received = group.exchange(packed, _numels(outgoing), _numels(incoming))
    del packed
    for data, views in zip(received, incoming, strict=True):
        for view, part in zip(views, torch.split(data, [view.numel() for view in views]), strict=True):
            view.copy_(part)
    return items


def _numels(views: list[list[Tensor]]) -> list[int]:
    return [sum(view.numel() for view in some) for some in views]
