"""Resharding of tensors for other ranks, and all-gathering of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage, RowPartition

_ALIGNMENT = 64  # bytes; received values can then be viewed as any dtype and loaded into vector registers


def whole_left(left: Tensor, partition: RowPartition, group: ShardGroup) -> Tensor:
    """All-gather a row-sharded factor ``[m_p, r]``: ``[m, r]``, replicated. One all-gather."""
    padded = left.new_zeros(partition.rows_per_rank, left.shape[1])
    padded[: left.shape[0]] = left
    return group.gather_equal(padded)[: partition.rows]


def redistribute(
    shards: Sequence[Mapping[str, Tensor]],
    layouts: list[dict[str, tuple[FlatStorage, FlatStorage]]],
    group_size: int,
    group: ShardGroup,
    *,
    kept_by: int | None = None,
) -> list[dict[str, Tensor]]:
    """Reshard items, each sharded over a group of `group_size` ranks, to groups of `kept_by` ranks. One all-to-all.

    Parameters
    ----------
    shards
        This rank's flat shards of the tensors of its items. Its items are those of `layouts` at ``rank // group_size``
        and every ``P / group_size`` from there.
    layouts
        For every item and name, the storage over `group_size` ranks and the one over `kept_by` ranks.
    group_size
        Number of consecutive ranks that share an item before. No other rank holds the item.
    group
        All ranks, P.
    kept_by
        Number of consecutive ranks that together hold all items afterwards; every such group holds them all. Default:
        all ranks.

    Returns
    -------
    list of dict
        For every item, this rank's flat shards over `kept_by` ranks, padding included. A shard that came whole from
        another rank is a view of the receive buffer and keeps all of it in memory: copy a few that are kept for long.
    """
    kept = group.size if kept_by is None else kept_by
    me, step = group.rank, group.size // group_size

    def pieces(source: int, target: int) -> list[_Piece]:
        """The pieces on `source` that `target` keeps, in the order in which they are sent."""
        found = []
        for item in range(source // group_size, len(layouts), step):
            for name, (held, wanted) in layouts[item].items():
                position, place = source % group_size, target % kept
                start = max(position * held.shard_numel, place * wanted.shard_numel)
                stop = min((position + 1) * held.shard_numel, (place + 1) * wanted.shard_numel, held.numel)
                if start < stop:
                    found.append(_Piece(item, name, start, stop))
        return found

    def of_shard(piece: _Piece) -> Tensor:
        first = me % group_size * layouts[piece.item][piece.name][0].shard_numel
        return shards[piece.item // step][piece.name][piece.start - first : piece.stop - first]

    def nbytes(piece: _Piece) -> int:
        return -(-(piece.stop - piece.start) * dtype_of(piece).itemsize // _ALIGNMENT) * _ALIGNMENT

    def dtype_of(piece: _Piece) -> torch.dtype:
        return layouts[piece.item][piece.name][1].dtype

    def packed(piece: _Piece) -> tuple[Tensor, Tensor]:
        data = of_shard(piece).contiguous().view(torch.uint8)
        return data, padding[: nbytes(piece) - data.numel()]

    device = next((shard.device for item in shards for shard in item.values()), group.device)
    outgoing = [[] if rank == me else pieces(me, rank) for rank in range(group.size)]
    incoming = [[] if rank == me else pieces(rank, me) for rank in range(group.size)]
    padding = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device=device)
    received = group.exchange(
        torch.cat([padding[:0], *(part for some in outgoing for piece in some for part in packed(piece))]),
        [sum(map(nbytes, some)) for some in outgoing],
        [sum(map(nbytes, some)) for some in incoming],
    )
    cut: list[dict[str, Tensor]] = [{} for _ in layouts]

    def keep(piece: _Piece, values: Tensor, *, as_it_is: bool) -> None:
        wanted, of_item = layouts[piece.item][piece.name][1], cut[piece.item]
        if values.numel() == wanted.shard_numel:
            of_item[piece.name] = values if as_it_is else values.clone()
            return
        if piece.name not in of_item:
            of_item[piece.name] = torch.zeros(wanted.shard_numel, dtype=wanted.dtype, device=device)
        first = piece.start - me % kept * wanted.shard_numel
        of_item[piece.name][first : first + values.numel()] = values

    for piece in pieces(me, me):  # copied, so that the rest of the shard can be freed
        keep(piece, of_shard(piece), as_it_is=False)
    for data, some in zip(received, incoming, strict=True):
        for piece, values in zip(some, torch.split(data, [nbytes(piece) for piece in some]), strict=True):
            keep(piece, values.view(dtype_of(piece))[: piece.stop - piece.start], as_it_is=True)
    for of_item, layout in zip(cut, layouts, strict=True):
        for name, (_, wanted) in layout.items():
            if name not in of_item:  # padding only
                of_item[name] = torch.zeros(wanted.shard_numel, dtype=wanted.dtype, device=device)
    return cut


class _Piece(NamedTuple):
    """Elements ``start:stop`` of the flat tensor `name` of an item."""

    item: int
    name: str
    start: int
    stop: int
