"""Sharded tensors cut anew for other ranks, and rows put together."""

from __future__ import annotations

from collections.abc import Mapping

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
    shards: Mapping[str, Tensor],
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
        This rank's flat shards of the tensors of item ``rank // group_size``; empty where there is no such item.
    layouts
        For every item and name: the storage over its `group_size` ranks and the one over `kept_by` ranks.
    group_size
        Consecutive ranks that share an item.
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

    me = group.rank
    device = next((shard.device for shard in shards.values()), group.device)
    outgoing = []
    for target in range(group.size):
        pieces = [torch.empty(0, dtype=torch.uint8, device=device)]
        for name, storages in layouts[me // group_size].items() if shards else ():
            start, stop = overlap(me, target, storages)
            first = me % group_size * storages[0].shard_numel
            if start < stop:
                pieces.append(shards[name][start - first : stop - first].contiguous().view(torch.uint8))
        outgoing.append(torch.cat(pieces))

    items = [
        {name: torch.zeros(cut.shard_numel, dtype=cut.dtype, device=device) for name, (_, cut) in layout.items()}
        for layout in layouts
    ]
    incoming: list[list[Tensor]] = []  # views of `items` to fill, in the order in which their ranks send
    for source in range(group.size):
        incoming.append([])
        index = source // group_size
        for name, storages in layouts[index].items() if index < len(layouts) else ():
            start, stop = overlap(source, me, storages)
            first = me % kept * storages[1].shard_numel
            if start < stop:
                incoming[-1].append(items[index][name][start - first : stop - first].view(torch.uint8))
    received = group.exchange(outgoing, [sum(view.numel() for view in views) for views in incoming])
    for data, views in zip(received, incoming, strict=True):
        for view, part in zip(views, torch.split(data, [view.numel() for view in views]), strict=True):
            view.copy_(part)
    return items
