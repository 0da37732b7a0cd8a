"""Sharded tensors cut anew for other ranks, and rows put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition, Storage

_ALIGNMENT = 64  # bytes: what is received may be viewed as any dtype, and loaded in vectors


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
        For every item this rank's flat shards over `kept_by` ranks, padding included. Those that one rank sent whole
        lie in what was received in this one exchange: who keeps few of them for long had better keep copies.
    """
    kept = group.size if kept_by is None else kept_by
    me, step = group.rank, group.size // group_size

    def pieces(source: int, target: int) -> list[_Piece]:
        """What `source` holds of what `target` keeps, in the order in which it is sent."""
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

    for piece in pieces(me, me):  # a copy, which does not keep the rest of the shard alive
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
