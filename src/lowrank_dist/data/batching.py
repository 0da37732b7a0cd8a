"""The settings that decide what batches are, and the samplers and loaders that make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowrank_dist.data.mixture import Mixing
from lowrank_dist.data.packing import Collator, ItemLists, Items
from lowrank_dist.data.sampler import ShardedSampler
from lowrank_dist.data.token_batches import TokenBatchSampler, batch_tokens, padded
from lowrank_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The options of `lowrank_dist.SFTDataModule` that decide what batches are; see there."""

    max_length: int
    batch_size: int
    tokens_per_batch: int | None
    packing: bool
    padding_free: bool
    group_by_length: bool
    num_workers: int
    streaming: bool
    shuffle_buffer: int
    seed: int

    def check(self) -> None:
        """Raise InputError if a number is out of range, or options exclude each other."""
        if self.packing and self.group_by_length:
            raise InputError(
                "packing=True and group_by_length=True exclude each other, because packed rows all have about "
                "max_length tokens; set one of them to false"
            )
        if self.tokens_per_batch is not None and self.batch_size != 1:
            raise InputError(
                f"batch_size={self.batch_size} and tokens_per_batch={self.tokens_per_batch} exclude each other; leave "
                "one of them out"
            )
        check_numbers(
            max_length=(self.max_length, 2),
            tokens_per_batch=(self.tokens_per_batch, padded(self.max_length)),
            batch_size=(self.batch_size, 1),
            num_workers=(self.num_workers, 0),
            shuffle_buffer=(self.shuffle_buffer, 1),
        )
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        for name, value, reason in (
            ("group_by_length", self.group_by_length, "sorts the whole set by length"),
            ("tokens_per_batch", self.tokens_per_batch, "divides the whole set into batches"),
        ):
            if value:
                raise InputError(f"{name}={value} {reason}, and streaming=True does not know it; leave one of them out")
        if self.num_workers > 1:
            raise InputError(
                f"num_workers={self.num_workers}: a stream is read in one process a rank; set it to 0 or 1"
            )

    def check_items(self, items: Items) -> None:
        """Raise InputError if an item has more tokens than a batch may have."""
        longest = max(items.lengths)
        largest = batch_tokens(1, longest, longest, rows=items.per_item)
        if self.tokens_per_batch is not None and self.tokens_per_batch < largest:
            raise InputError(
                f"tokens_per_batch={self.tokens_per_batch} is less than the largest pair has, {largest}; raise it, or "
                "lower max_length"
            )

    def sampler(
        self,
        dataset: Items,
        *,
        num_replicas: int,
        rank: int,
        alone: bool,
        shuffle: bool,
        repeats: bool,
        mixing: Mixing | None = None,
    ) -> ShardedSampler:
        """The sampler of one of `num_replicas` ranks; arguments as of `ShardedSampler`."""
        settings: dict[str, Any] = {
            "num_replicas": num_replicas,
            "rank": rank,
            "alone": alone,
            "shuffle": shuffle,
            "seed": self.seed,
            "group_by_length": self.group_by_length,
            "repeats": repeats,
            "mixing": mixing,
        }
        if self.tokens_per_batch is not None:
            return TokenBatchSampler(
                dataset, tokens_per_batch=self.tokens_per_batch, padding_free=self.padding_free, **settings
            )
        return ShardedSampler(dataset, batch_size=self.batch_size, **settings)

    def collator(self, pad_token_id: int) -> Collator:
        """What makes a batch of items."""
        return Collator(pad_token_id, padding_free=self.padding_free)

    def loader_arguments(self, dataset: Items, pad_token_id: int) -> dict[str, Any]:
        """Arguments of a DataLoader beside the sampler."""
        by_tokens = self.tokens_per_batch is not None  # the sampler makes the batches
        return {
            "dataset": ItemLists(dataset) if by_tokens else dataset,
            "batch_size": None if by_tokens else self.batch_size,
            "collate_fn": self.collator(pad_token_id),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def full_rows(*, batch_size: int, tokens_per_batch: int | None, max_length: int, per_item: int) -> int:
    """Rows of `max_length` tokens that a batch of one device has at most, for forecasts of its memory.

    Parameters
    ----------
    batch_size, tokens_per_batch, max_length
        Options of `lowrank_dist.SFTDataModule`.
    per_item
        Rows of an item: 2 for pairs.
    """
    return batch_size * per_item if tokens_per_batch is None else max(1, tokens_per_batch // max_length)


def check_numbers(**least: tuple[int | None, int]) -> None:
    """Raise InputError for the first value that is smaller than the number beside it; None is none."""
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise InputError(f"{name}={value} must be at least {smallest}")
