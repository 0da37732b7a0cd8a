"""The share and order of a rank's examples, and the position from which a run resumes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lowrank_dist.data.mixture import Mixing, Mixture
from lowrank_dist.data.packing import Items
from lowrank_dist.errors import InputError


class ShardedSampler(DistributedSampler[Any]):
    """A rank's share of every step. All ranks have the same number of batches, of the same sizes.

    The order of an epoch is global and the same on every rank. A step takes the next ``batch_size * num_replicas``
    items and gives each rank a consecutive part. The last step may be smaller, and its parts then differ by one item:
    those that lack it have a filler without labels (see `Items`), so that every item counts exactly once, or another
    item.

    The class derives from `DistributedSampler` because Lightning wraps or replaces any other sampler.

    Parameters
    ----------
    dataset
        Dataset to sample.
    batch_size
        Items in a batch on one rank.
    num_replicas, rank
        Number of ranks, and this rank.
    alone
        Nobody knew of other ranks: iterating raises InputError if there are any.
    shuffle
        Draw a new order every epoch (training), or keep the order of the set (evaluation).
    seed
        Seed of the order, together with the epoch.
    group_by_length
        Form steps from items of similar length: the items of up to 50 steps are sorted and split into steps, which are
        then shuffled. The step with the longest item comes first, so that a lack of memory shows at once.
    repeats
        Repeat an item in place of a filler, as `DistributedSampler` does: for steps that do not expect a row without
        labels, of which a mean is NaN.
    mixing
        Weights of the parts of the set, for training: an epoch is drawn by them (`lowrank_dist.data.mixture.Mixture`).
        None: it has every item once.
    """

    def __init__(
        self,
        dataset: Items,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        alone: bool = False,
        seed: int = 0,
        group_by_length: bool = False,
        repeats: bool = False,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.mixture = None if mixing is None else self._mixture(mixing)
        self.lengths = torch.tensor(dataset.lengths) if group_by_length else None
        self.alone = alone
        self.repeats, self.group_by_length = repeats, group_by_length
        self.step_size = self.order_step_size = batch_size * num_replicas
        self.start = self.handed_out = 0

    def _mixture(self, mixing: Mixing) -> Mixture:
        """What an epoch draws: items."""
        dataset: Any = self.dataset
        return mixing.over(dataset.part_sizes, seed=self.seed, unit=dataset.unit)

    def __len__(self) -> int:
        return -(-self.epoch_items() // self.num_replicas)

    def epoch_items(self) -> int:
        """Number of items of this epoch, over all ranks."""
        return len(self.dataset) if self.mixture is None else self.mixture.total  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Select the order of `epoch`. A new epoch starts at its first item, in an order for this number of ranks."""
        if epoch != self.epoch:
            self.start = self.handed_out = 0
            self.order_step_size = self.step_size
        super().set_epoch(epoch)

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
        """Continue an epoch after its first `start` items, in the order of a run with steps of `order_step_size`.

        `padding_free` belongs to `tokens_per_batch`. `order` is what decided the order of that run, or None if it did
        not record it.

        Raises
        ------
        InputError
            If the run had batches of so many tokens, drew other numbers of the parts, or ended within an epoch of
            another order.
        """
        if tokens_per_batch is not None:
            raise InputError(
                f"the resumed run had tokens_per_batch={tokens_per_batch}, and this one has batch_size: in the middle "
                "of an epoch its items cannot be divided otherwise; resume with the same"
            )
        self._check_drawn(drawn)
        super().set_epoch(epoch)
        if order is not None and start % order["items"]:
            self._check_order(order)
        self.start = self.handed_out = start % (self.epoch_items() if order is None else order["items"])
        self.order_step_size = order_step_size

    def _check_drawn(self, drawn: Sequence[int] | None) -> None:
        mine = None if self.mixture is None else self.mixture.counts
        if (None if drawn is None else list(drawn)) != mine:
            raise InputError(
                f"the resumed run drew {_counts(drawn)} an epoch, and this one draws {_counts(mine)}: its epoch cannot "
                "go on; resume with the same weights and data"
            )

    def _check_order(self, order: Mapping[str, Any]) -> None:
        changed = [
            f"{name}={order.get(name)} (now {now})" for name, now in self._order().items() if order.get(name) != now
        ]
        if changed:
            raise InputError(
                "the resumed run ended in the middle of an epoch, and the order of its items depends on "
                f"{', '.join(changed)}: some items would come twice and others never; resume with the same data and "
                "settings, or from the end of an epoch, or begin a new run with the adapter of that one"
            )

    def _order(self) -> dict[str, Any]:
        """What decides the order of this epoch, beside its number and `order_step_size`."""
        order: dict[str, Any] = {
            "seed": self.seed,
            "items": self.epoch_items(),
            "group_by_length": self.group_by_length,
        }
        if self._goes_by_lengths():
            dataset: Any = self.dataset
            order["lengths"] = f"crc32 {zlib.crc32(torch.tensor(dataset.lengths).numpy().tobytes()):08x}"
        return order

    def _goes_by_lengths(self) -> bool:
        return self.group_by_length

    def state(self) -> dict[str, Any]:
        """What `resume` takes beside the position."""
        return {"epoch": self.epoch, "order_step_size": self.order_step_size, **self._common_state()}

    def _common_state(self) -> dict[str, Any]:
        return {"order": self._order()} | ({} if self.mixture is None else {"drawn": self.mixture.counts})

    def items_after(self, start: int, steps: int) -> int:
        """Items of the epoch that all ranks have had, `steps` steps after the first `start` ones."""
        return min(self.epoch_items(), start + steps * self.step_size)

    def order(self) -> list[int]:
        """Global order of this epoch, before padding; the same on every rank."""
        total = self.epoch_items()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        if self.mixture is not None:
            order = self.mixture.drawn(self.epoch)[order]
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

    def check_ranks(self) -> None:
        """Raise InputError if there are ranks that this sampler does not know."""
        if self.alone:
            check_alone()

    def __iter__(self) -> Iterator[int]:
        self.check_ranks()
        order = self.order()
        todo = order[self.start :]
        for at in range(0, len(todo), self.step_size):
            step = todo[at : at + self.step_size]
            first, last = (rank * len(step) // self.num_replicas for rank in (self.rank, self.rank + 1))
            mine = step[first:last]
            yield from mine
            if len(mine) * self.num_replicas < len(step):
                yield order[self.rank % len(order)] if self.repeats else ~step[0]


def check_alone() -> None:
    """Raise InputError if this process is one of several ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(
            f"these batches were made where no other ranks were known, and there are {dist.get_world_size()}, which "
            "would all train on every example; pass the data module itself to the Trainer, or make the loader once the "
            "ranks have met (in the setup of your own data module, or later)"
        )


def unused_batches(trainer: Any) -> int:
    """Number of batches of an unfinished step, in a checkpoint that is saved on an exception."""
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return 0
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    unused: int = progress.current.ready - progress.current.processed
    # the last step of an epoch may have fewer batches
    epoch_ended = progress.is_last_batch and not unused
    if getattr(trainer.strategy, "resumes_whole_steps", False) and not epoch_ended:
        unused += progress.current.processed % trainer.accumulate_grad_batches
    return unused


def _counts(drawn: Sequence[int] | None) -> str:
    return "every item once" if drawn is None else f"{' + '.join(map(str, drawn))} of its sources"


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A `DataLoader` over a `ShardedSampler` that tracks its position in the epoch.

    Parameters
    ----------
    unused
        Returns how many of the last batches must be repeated after resuming.
    **settings
        Arguments of `DataLoader`.

    Notes
    -----
    The state is a few integers, the same on every rank. It can be loaded on another number of ranks: the rest of the
    epoch is then distributed again, without repeating or omitting an item.
    """

    def __init__(self, *args: Any, unused: Callable[[], int] = lambda: 0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.unused = unused
        self._begun = self._steps = 0  # first item of this iteration, and its number of steps so far

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its items yielded so far over all ranks, and what decides its order."""
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):  # Lightning's overfit_batches replaces the sampler
            return {}
        start = sampler.handed_out
        if unused := self.unused():
            start = sampler.items_after(self._begun, max(0, self._steps - unused))
        return {**sampler.state(), "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`."""
        if state and isinstance(self.sampler, ShardedSampler):
            self.sampler.resume(**state)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator reads the sampler only when the first batch is requested. Lightning creates the iterator before it
        # restores a checkpoint and sets the epoch.
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):
            yield from super().__iter__()
            return
        start = sampler.start
        for step, batch in enumerate(super().__iter__(), start=1):
            sampler.start = 0  # a later iteration starts from the beginning
            sampler.handed_out = sampler.items_after(start, step)
            self._begun, self._steps = start, step
            yield batch
