"""Training data that are read while training: for sets too large to be tokenized beforehand.

Records are counted through all passes over the sources, and the rank of a record is its number modulo the number of
ranks. Every rank reads all records and renders its own. No rank ever lacks a batch: the passes never end, whatever the
number of records or of those that are left out, so that ranks cannot wait for one that has none.

A rank takes its records in blocks of `shuffle_buffer`, or of its share of a pass if the first look has seen a whole
pass. The examples of a block are packed, if asked, shuffled by the seed, the rank and the number of the block, and
handed out. A position is therefore two numbers, block and item. To go on from it, earlier records are read but not
rendered, and one block is rendered again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lowrank_dist.data.chunks import CHUNK, Chunk, Preparer
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.mixture import Part
from lowrank_dist.data.packing import Collator, TokenDataset, Tokens
from lowrank_dist.data.records import Records
from lowrank_dist.data.tokenizing import WEIGHTS
from lowrank_dist.errors import InputError

log = logging.getLogger(__name__)

_REMEMBERED = 10_000  # positions of the last batches

Position = tuple[int, int]
"""Number of the block, and items of it that were handed out."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What the batches of a stream are.

    Attributes
    ----------
    parts
        The sources, one after the other.
    preparer
        What makes examples of records.
    shuffle_buffer
        Records of a rank that are rendered, packed and shuffled together.
    batch_size
        Items in a batch on one rank.
    capacity
        Largest number of tokens in a packed row. None: no packing.
    per_item
        Consecutive examples in an item.
    collate
        Makes a batch of items.
    seed
        Seed of the order.
    total
        Records of a pass, if they are fewer than `shuffle_buffer`. None: not known.
    """

    parts: Sequence[Part]
    preparer: Preparer
    shuffle_buffer: int
    batch_size: int
    capacity: int | None
    per_item: int
    collate: Collator
    seed: int
    total: int | None = None

    def block(self, num_replicas: int) -> int:
        """Records of a block of a rank: `shuffle_buffer`, or so few that a block has none of them twice."""
        return self.shuffle_buffer if self.total is None else max(1, self.total // num_replicas)

    def records(self, bad: Callable[[InputError], None]) -> Records:
        """One pass over the sources."""
        return chain.from_iterable(islice(part.source.records(bad), part.limit) for part in self.parts)

    def chunk(self, records: Records, unread: list[str], count: int) -> Loaded:
        """Examples of the next `count` records."""
        loaded = Loaded()
        for at in range(0, count, CHUNK):
            loaded.add(self.preparer(Chunk(records=list(islice(records, min(CHUNK, count - at))))))
        loaded.skipped += unread
        loaded.records += len(unread)
        unread.clear()
        if any(WEIGHTS in one for one in loaded.along):
            raise InputError(
                f"{self.parts[0].source}: messages have a `weight` other than 0 and 1, which streaming cannot take, "
                "because other ranks do not know of them; set streaming to false"
            )
        return loaded

    def first(self) -> tuple[int, StreamSettings, list[str]]:
        """The largest token of the first records, at most `shuffle_buffer` of them, and what becomes of them, in lines.

        Between the two: these settings, with `total` if a pass has no further records.

        Raises
        ------
        InputError
            If one of them is bad and they are not skipped, or none of them is left.
        """
        unread: list[str] = []

        def bad(error: InputError) -> None:
            if self.preparer.on_bad_record == "error":
                raise error
            unread.append(str(error))

        loaded = self.chunk(self.records(bad), [], self.shuffle_buffer)
        settings = self if loaded.records == self.shuffle_buffer else replace(self, total=loaded.records)
        loaded.skipped += unread
        loaded.records += len(unread)
        if not loaded.kept:
            raise InputError(
                f"{self.parts[0].source}: none of the first {loaded.records} records is left: "
                f"{'; '.join(loaded.lines(self.preparer.max_length)) or 'it holds none'}"
            )
        looked_at = f"all {loaded.records} records have {loaded.kept} examples"
        if settings.total is None:
            looked_at = (
                f"the {loaded.records} records looked at have {loaded.kept} examples; the others are read in training"
            )
        largest = Tokens.of(loaded.examples, loaded.along, loaded.targets).largest
        return largest, settings, [looked_at, *loaded.lines(self.preparer.max_length)]

    def identity(self) -> dict[str, Any]:
        """What decides the items of a block and their order."""
        return {
            "shuffle_buffer": self.shuffle_buffer,
            "max_length": self.preparer.max_length,
            "on_long_example": self.preparer.on_long_example,
            "packing": self.capacity is not None,
            "seed": self.seed,
        }


class Stream(IterableDataset[tuple[Batch, Position]]):
    """The batches of one rank from a position on, each with the position after it. It does not end.

    Raises
    ------
    InputError
        While it is read: for a bad record, unless they are skipped, and if none is left for this rank.
    """

    def __init__(self, settings: StreamSettings, *, num_replicas: int, rank: int, start: Position) -> None:
        self.settings, self.num_replicas, self.rank, self.start = settings, num_replicas, rank, start
        self._passes = 0
        self._told = False
        self._unread: list[str] = []
        self._skipped = 0

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        settings = self.settings
        block, done = self.start
        size = settings.block(self.num_replicas)
        records = self._own_records(block * size)
        pending: list[dict[str, Any]] = []
        barren = 0  # passes when the last item was there
        while True:
            loaded = settings.chunk(records, self._unread, size)
            self._tell(loaded)
            if loaded.kept:
                barren = self._passes
                tokens = Tokens.of(loaded.examples, loaded.along, loaded.targets)
                items = TokenDataset(tokens, settings.capacity, per_item=settings.per_item)
                for place, index in enumerate(self._order(block, len(items))):
                    if place < done:
                        continue
                    pending.append(items[index])
                    if len(pending) == settings.batch_size:
                        yield settings.collate(pending), (block, place + 1)
                        pending = []
            elif self._passes > barren + 1:
                raise InputError(
                    f"{settings.parts[0].source}: rank {self.rank} has read its records twice, and none is left: "
                    f"{'; '.join(loaded.lines(settings.preparer.max_length))}"
                )
            block, done = block + 1, 0

    def _own_records(self, first: int) -> Records:
        """This rank's records without its `first` ones, pass after pass."""
        number, wanted = 0, first * self.num_replicas
        while True:
            begun = number
            for record in self.settings.records(self._bad):
                if number >= wanted and number % self.num_replicas == self.rank:
                    yield record
                number += 1
            total = number - begun
            if total == 0:
                raise InputError(f"{self.settings.parts[0].source} holds no record")
            self._passes += 1
            if number < wanted:
                number += (wanted - number) // total * total  # whole passes
            elif self.rank == 0 and not self._told:
                self._told = True
                log.warning("train: all %d records were read; they are read again", total)

    def _bad(self, error: InputError) -> None:
        """Every rank reads a record that cannot be read; the first counts it."""
        if self.settings.preparer.on_bad_record == "error":
            raise error
        if self.rank == 0:
            self._unread.append(str(error))

    def _order(self, block: int, total: int) -> list[int]:
        digest = hashlib.sha256(f"{self.settings.seed} {self.rank} {block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order: list[int] = torch.randperm(total, generator=generator).tolist()
        return order

    def _tell(self, loaded: Loaded) -> None:
        """Say how many records were skipped whenever their number has grown tenfold."""
        before, self._skipped = self._skipped, self._skipped + len(loaded.skipped)
        if len(str(self._skipped)) > len(str(before)) or (self._skipped and not before):
            log.warning("train: rank %d has skipped %d records so far; %s", self.rank, self._skipped, loaded.skipped[0])


class StreamLoader:
    """The batches of one rank for a Trainer, from where the last ones ended.

    Parameters
    ----------
    open_stream
        The stream from a position on.
    length
        Number of batches of a run, which is what Lightning takes for an epoch.
    num_workers
        Processes that read and tokenize: 0 or 1.
    unused
        Returns how many of the last batches must be repeated after resuming.

    Notes
    -----
    Its `state_dict`, by which Lightning knows a loader that resumes, is empty: positions differ from rank to rank, and
    Lightning would give all ranks that of the first. `lowrank_dist.SFTDataModule` collects and returns them.
    """

    def __init__(
        self,
        open_stream: Callable[[Position], Stream],
        *,
        length: int,
        num_workers: int,
        unused: Callable[[], int] = lambda: 0,
    ) -> None:
        self._open, self._length, self._num_workers, self._unused = open_stream, length, num_workers, unused
        self._trail: deque[Position] = deque([(0, 0)])

    def __len__(self) -> int:
        return self._length

    def position(self) -> Position:
        """Where to go on after the batches that were used."""
        return self._trail[-1 - self._unused()]

    def end(self) -> Position:
        """Where the last batch ended, from which the next iteration goes on."""
        return self._trail[-1]

    def go_on_from(self, position: Position) -> None:
        """Continue from a position."""
        self._trail = deque([position])

    def state_dict(self) -> dict[str, Any]:
        """Nothing (see above)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def __iter__(self) -> Iterator[Batch]:
        # a generator looks at the position when the first batch is asked for, after a checkpoint was read
        self._trail = deque([self.end()], maxlen=_REMEMBERED)
        loader = DataLoader(
            self._open(self.end()),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
        )
        for batch, position in islice(loader, self._length):
            self._trail.append(tuple(position))
            yield batch


def _unchanged(value: Any) -> Any:
    return value


def streamed_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts whose data sets of the hub are read as they come.

    Raises
    ------
    InputError
        If they have weights.
    """
    if weighted := [part for part in parts if part.weight is not None]:
        raise InputError(
            f"{weighted[0].source.role}.weight={weighted[0].weight:g}: shares need the number of examples, and "
            "streaming=True does not know it; leave the weights out, or mix the files beforehand"
        )
    return tuple(replace(part, source=replace(part.source, streaming=True)) for part in parts)


def check_streaming_trainer(trainer: Any) -> None:
    """Raise InputError if a Trainer does not say when to stop, or wants some batches again and again."""
    if trainer is None:
        return
    if trainer.max_steps < 1:
        raise InputError(
            f"streaming=True with max_steps={trainer.max_steps}: a stream has no end; set trainer.max_steps"
        )
    if trainer.overfit_batches:
        raise InputError(
            f"overfit_batches={trainer.overfit_batches} needs a set that can be read again; set streaming to false"
        )


def of_all_ranks(position: Position, trainer: Any) -> list[Position]:
    """The positions of all ranks of a Trainer; collective, as saving a checkpoint is."""
    ranks = (None if trainer is None else trainer.distributed_sampler_kwargs) or {}
    if ranks.get("num_replicas", 1) == 1:
        return [position]
    gathered = trainer.strategy.all_gather(torch.tensor(position, device=trainer.strategy.root_device))
    return [(block, item) for block, item in gathered.view(-1, 2).tolist()]


def stream_state(settings: StreamSettings, positions: Sequence[Position]) -> dict[str, Any]:
    """What `stream_position` takes: the positions of all ranks."""
    return {"streamed": [list(position) for position in positions], "stream": settings.identity()}


def stream_position(
    state: dict[str, Any], settings: StreamSettings | None, *, num_replicas: int, rank: int
) -> Position | None:
    """The position of a rank in the state of a run; None at its beginning.

    Raises
    ------
    InputError
        If the run did not stream, or with other settings or another number of ranks.
    """
    if not state:
        return None
    positions = state.get("streamed")
    if (positions is None) != (settings is None):
        was, now = ("streamed", "does not") if settings is None else ("did not stream", "does")
        raise InputError(
            f"the resumed run {was} its data, and this one {now}: its position means nothing here; set streaming to "
            f"{str(settings is None).lower()}"
        )
    if settings is None or positions is None:
        return None
    if len(positions) != num_replicas:
        raise InputError(
            f"the resumed run streamed its data on {len(positions)} ranks, and this one has {num_replicas}: the "
            "records that each rank has had cannot be divided otherwise; resume on the same number of ranks"
        )
    mine, before = settings.identity(), state.get("stream")
    if before != mine:
        raise InputError(
            f"the resumed run streamed its data with {before}, and this one with {mine}: its blocks are others; resume "
            "with the same"
        )
    block, item = positions[rank]
    return int(block), int(item)
