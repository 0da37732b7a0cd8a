"""Which examples a rank sees in which order, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lowrank_dist.data.packing import TokenDataset


class ShardedSampler(DistributedSampler[Any]):
    """A rank's share of every step, with the same number of batches, equally large, on every rank.

    The order of an epoch is global and the same on every rank. A step takes the next ``batch_size * num_replicas``
    items and gives each rank a consecutive part. The last step may be smaller; the items it lacks to divide by the
    number of ranks are filled in: in training (`shuffle`) from the front of the epoch, in evaluation by fillers that
    hold no label (see `TokenDataset`), so that every item counts exactly once.

    It is a `DistributedSampler` because Lightning wraps or replaces any other one.

    Parameters
    ----------
    dataset
        What is sampled.
    batch_size
        Items of a batch on one rank.
    num_replicas, rank
        Number of ranks, and this one's.
    shuffle
        Draw a new order every epoch (training), or keep the order of the set (evaluation).
    seed
        Of the order, together with the epoch.
    group_by_length
        Make steps of items of similar length: up to 50 steps' items are sorted and cut into steps, which are then
        shuffled. The step with the longest item comes first, so that a run short of memory fails at once.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = torch.tensor(dataset.lengths) if group_by_length else None
        self.step_size = self.order_step_size = batch_size * num_replicas
        self.start = self.handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of `epoch`; a new epoch starts at its beginning, in an order for this number of ranks."""
        if epoch != self.epoch:
            self.start = self.handed_out = 0
            self.order_step_size = self.step_size
        super().set_epoch(epoch)

    def resume(self, *, epoch: int, start: int, order_step_size: int) -> None:
        """Continue an epoch behind its first `start` items, in the order of a run with steps of `order_step_size`."""
        super().set_epoch(epoch)
        self.start = self.handed_out = start % len(self.dataset)  # type: ignore[arg-type]
        self.order_step_size = order_step_size

    def order(self) -> list[int]:
        """Global order of this epoch, before filling; the same on every rank."""
        total = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        if self.lengths is None:
            return order.tolist()
        if not self.shuffle:
            return self.lengths.argsort(descending=True, stable=True).tolist()
        step = self.order_step_size
        whole, rest = order[: total - total % step], order[total - total % step :]
        if len(whole):
            windows = whole.split(step * min(50, max(1, total // (4 * step))))
            grouped = [window[self.lengths[window].argsort(descending=True, stable=True)] for window in windows]
            steps = torch.cat(grouped).view(-1, step)
            steps = steps[torch.randperm(len(steps), generator=generator)]
            first = int(self.lengths[steps].amax(dim=1).argmax())
            steps[[0, first]] = steps[[first, 0]]
            whole = steps.flatten()
        return torch.cat([whole, rest]).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        todo = order[self.start :]
        lacking = -len(todo) % self.num_replicas
        todo += [order[i % len(order)] if self.shuffle else ~order[0] for i in range(lacking)]
        for at in range(0, len(todo), self.step_size):
            step = todo[at : at + self.step_size]
            share = len(step) // self.num_replicas
            yield from step[self.rank * share : (self.rank + 1) * share]


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A `DataLoader` over a `ShardedSampler` that knows how much of the epoch it has handed out.

    Parameters
    ----------
    unused
        Tells how many of the last batches are to be handed out again after resuming.
    **settings
        Of `DataLoader`.

    Notes
    -----
    Its state is three integers, the same on every rank, and can be loaded on another number of ranks: what is left of
    the epoch is then dealt out anew, no item twice and none left out.
    """

    def __init__(self, *args: Any, unused: Callable[[], int] = lambda: 0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.unused = unused
        self._begun = self._steps = 0  # where this iteration began, in items, and its steps since

    def state_dict(self) -> dict[str, int]:
        """Epoch, items handed out in it over all ranks, and the step size that its order was drawn for."""
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):  # Lightning's overfit_batches puts another one in its place
            return {}
        start = sampler.handed_out
        if unused := self.unused():
            start = self._begun + max(0, self._steps - unused) * sampler.step_size
        return {"epoch": sampler.epoch, "start": start, "order_step_size": sampler.order_step_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        if state and isinstance(self.sampler, ShardedSampler):
            self.sampler.resume(**state)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator: nothing is read from the sampler before the first batch is asked for. Lightning creates the
        # iterator before it has restored a checkpoint and before it has set the epoch.
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):
            yield from super().__iter__()
            return
        start, total = sampler.start, len(sampler.dataset)  # type: ignore[arg-type]
        for step, batch in enumerate(super().__iter__(), start=1):
            sampler.start = 0  # has been read: whoever iterates again starts from the beginning
            sampler.handed_out = min(total, start + step * sampler.step_size)
            self._begun, self._steps = start, step
            yield batch
