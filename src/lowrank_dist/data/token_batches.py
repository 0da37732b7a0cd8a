"""Batches of at most so many tokens, padding included, and each rank's share of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from lowrank_dist.data.mixture import Mixing, Mixture
from lowrank_dist.data.packing import PAD_TO_MULTIPLE_OF, Items
from lowrank_dist.data.sampler import ShardedSampler
from lowrank_dist.errors import InputError

_WINDOW = 50  # batches whose items are sorted by length together


def padded(length: int) -> int:
    """Number of tokens of a row of a batch whose longest item has `length`."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF


def batch_tokens(number: int, longest: int, total: int, *, rows: int = 1, joined: bool = False) -> int:
    """Number of tokens, padding included, of a batch of `number` items with `total` tokens; see `token_batches`."""
    return padded(total) if joined else number * rows * padded(longest)


def token_batches(
    order: Sequence[int], lengths: Sequence[int], most: int, *, rows: int = 1, joined: bool = False
) -> list[list[int]]:
    """Consecutive items of `order` in batches that are as large as `most` tokens allow, padding included.

    Parameters
    ----------
    order
        Indices of the items.
    lengths
        Number of tokens of each item.
    most
        Largest number of tokens of a batch; an item that has more is a batch by itself.
    rows
        Rows of an item in a batch.
    joined
        Whether the items of a batch are joined in one row, without padding between them.
    """
    batches: list[list[int]] = []
    number = longest = total = 0
    for index in order:
        length = lengths[index]
        number, longest, total = number + 1, max(longest, length), total + length
        if not batches or batch_tokens(number, longest, total, rows=rows, joined=joined) > most:
            batches.append([])
            number, longest, total = 1, length, length
        batches[-1].append(index)
    return batches


def _ranges(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of these sizes."""
    ends = list(accumulate(sizes, initial=0))
    return [range(begin, end) for begin, end in pairwise(ends)]


class TokenBatchSampler(ShardedSampler):
    """A rank's share of batches of at most `tokens_per_batch` tokens, as lists of items.

    Which items make a batch is decided once, by `seed` and the lengths alone, so that all epochs have the same number
    of steps on any number of ranks; the order of the batches is drawn every epoch. A step takes the next batches, one
    for each rank. If fewer are left for the last step, the largest of them are divided, and ranks for which nothing is
    left have a filler without labels.

    Parameters
    ----------
    dataset, num_replicas, rank, alone, shuffle, seed, repeats
        As of `ShardedSampler`.
    mixing
        As of `ShardedSampler`; each batch then has items of one part, and batches are drawn.
    tokens_per_batch
        Largest number of tokens of a batch on one rank, padding included.
    group_by_length
        Form batches from items of similar length, of windows of some 50 batches.
    padding_free
        The items of a batch are joined in one row, so that they have no padding between them.
    """

    def __init__(
        self,
        dataset: Items,
        *,
        tokens_per_batch: int,
        group_by_length: bool,
        padding_free: bool = False,
        mixing: Mixing | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, batch_size=1, **settings)
        self.tokens_per_batch, self.padding_free = tokens_per_batch, padding_free
        self.group_by_length = group_by_length
        lengths, generator = dataset.lengths, torch.Generator().manual_seed(self.seed)
        self.batches: list[list[int]] = []
        self._of_part: list[int] = []  # number of batches
        for part in _ranges([len(dataset)] if mixing is None else dataset.part_sizes):
            total = len(part)
            order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
            items = [part[index] for index in order.tolist()]
            if group_by_length:
                mean = sum(padded(lengths[index]) for index in part) * dataset.per_item / total
                window = max(1, int(_WINDOW * tokens_per_batch / mean)) if self.shuffle else total
                items = [
                    index
                    for at in range(0, total, window)
                    for index in sorted(items[at : at + window], key=lambda index: -lengths[index])
                ]
            batches = token_batches(items, lengths, tokens_per_batch, rows=dataset.per_item, joined=padding_free)
            self.batches += batches
            self._of_part.append(len(batches))
        self._tokens = [
            batch_tokens(len(sizes), max(sizes), sum(sizes), joined=padding_free)
            for sizes in ([lengths[index] for index in batch] for batch in self.batches)
        ]
        self._of_epoch: tuple[int, list[list[int]], list[int]] | None = None
        self.mixture = None if mixing is None else self._mixture(mixing)

    def _mixture(self, mixing: Mixing) -> Mixture:
        """What an epoch draws: batches."""
        return mixing.over(self._of_part, seed=self.seed, unit="batches")

    def epoch_items(self) -> int:
        return len(self.dataset) if self.mixture is None else self.epoch_batches()[1][-1]  # type: ignore[arg-type]

    def epoch_batches(self) -> tuple[list[list[int]], list[int]]:
        """All batches of this epoch in their order, the same on every rank, and where each begins and the last ends.

        The batch with most tokens comes first.
        """
        if self._of_epoch is None or self._of_epoch[0] != self.epoch:
            batches = self._ordered()
            self._of_epoch = self.epoch, batches, [0, *accumulate(map(len, batches))]
        return self._of_epoch[1:]

    def _ordered(self) -> list[list[int]]:
        if not self.shuffle:
            return self.batches
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.arange(len(self.batches)) if self.mixture is None else self.mixture.drawn(self.epoch)
        order = drawn[torch.randperm(len(drawn), generator=generator)].tolist()
        first = order.index(min(order, key=lambda place: (-self._tokens[place], place)))
        order[0], order[first] = order[first], order[0]
        return [self.batches[place] for place in order]

    def __len__(self) -> int:
        batches = len(self.batches) if self.mixture is None else self.mixture.total
        return -(-batches // self.num_replicas)

    def state(self) -> dict[str, Any]:
        joined = {"padding_free": True} if self.padding_free else {}
        return {"epoch": self.epoch, "tokens_per_batch": self.tokens_per_batch, **joined, **self._common_state()}

    def _goes_by_lengths(self) -> bool:
        return True

    def resume(
        self,
        *,
        epoch: int,
        start: int,
        order_step_size: int = 0,
        tokens_per_batch: int | None = None,
        padding_free: bool = False,
        drawn: Sequence[int] | None = None,
        order: Mapping[str, Any] | None = None,
    ) -> None:
        """Continue an epoch after its first `start` items.

        Raises
        ------
        InputError
            If the run had other batches.
        """
        for name, had, has in (
            ("tokens_per_batch", tokens_per_batch, self.tokens_per_batch),
            ("padding_free", padding_free, self.padding_free),
        ):
            if had != has:
                raise InputError(
                    f"the resumed run had {name}={had}, and this one has {has}: in the middle of an epoch its items "
                    "cannot be divided otherwise; resume with the same"
                )
        super().resume(epoch=epoch, start=start, order_step_size=self.order_step_size, drawn=drawn, order=order)

    def items_after(self, start: int, steps: int) -> int:
        _, ends = self.epoch_batches()
        place = bisect_left(ends, start) + steps * self.num_replicas
        return ends[min(place, len(ends) - 1)]

    def __iter__(self) -> Iterator[Any]:
        self.check_ranks()
        batches, ends = self.epoch_batches()
        todo = batches[bisect_left(ends, self.start) :]
        for at in range(0, len(todo), self.num_replicas):
            step = todo[at : at + self.num_replicas]
            if len(step) < self.num_replicas:
                step = self._divided(step, batches)
            yield step[self.rank]

    def _divided(self, step: list[list[int]], batches: list[list[int]]) -> list[list[int]]:
        """As many batches as ranks, of the items of fewer."""
        step = list(step)
        while len(step) < self.num_replicas:
            largest = max(range(len(step)), key=lambda place: len(step[place]))
            batch = step[largest]
            half = len(batch) // 2
            if half == 0:  # all have one item
                break
            step[largest : largest + 1] = [batch[:half], batch[half:]]
        for rank in range(len(step), self.num_replicas):
            step.append([batches[rank % len(batches)][0]] if self.repeats else [~step[0][0]])
        return step
