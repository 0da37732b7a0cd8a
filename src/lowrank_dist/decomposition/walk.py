"""The walk: matrices of a checkpoint in, decomposed matrices out, cut for the ranks that will keep them.

Every rank reads its own rows of a matrix, decomposes them together with the others and encodes its rows of the
residual. All ranks share a matrix, or a batch of several gives each to a part of the ranks
(`lowrank_dist.decomposition.schedule` decides), and what they found is then cut anew for all ranks with one all-to-all.
Either way the ranks together read every byte once, and what comes out is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lowrank_dist.decomposition.measure import Measure, measures_of, report_of
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, RowPartition, Storage
from lowrank_dist.distributed.reshard import redistribute, whole_left
from lowrank_dist.errors import ModelError
from lowrank_dist.methods.base import Factors, Matrix, Method
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.prefetch import RowBlock, RowRange, read_blocks
from lowrank_dist.storage.reader import CheckpointReader

FACTORS = ("lora_A", "lora_B")
_ENCODED_FROM = {name: f"encoded_from.{name}" for name in FACTORS}  # among a matrix's shards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Matrices whose results are exchanged together, where they are.

    Every `group_size` consecutive ranks share a matrix, and take another where there are more than such groups.
    """

    group_size: int
    matrices: tuple[PlannedMatrix, ...]

    def of_rank(self, rank: int, world_size: int) -> tuple[PlannedMatrix, ...]:
        """Those that `rank` works on, in order."""
        return self.matrices[rank // self.group_size :: world_size // self.group_size]


@dataclass(frozen=True, kw_only=True)
class DecomposedMatrix:
    """One matrix as this rank keeps it.

    Attributes
    ----------
    planned
        Which.
    partition
        How its rows are cut over all ranks.
    residual
        This rank's flat shards of the encoded residual, by storage name.
    factors
        This rank's flat shards of A ``[r, in]`` (``lora_A``) and B ``[out, r]`` (``lora_B``), possibly padded.
    report
        What was measured; the same on every rank but for `seconds`.
    encoded_from
        Flat shards, like `factors`, of those that the residual was encoded from, where
        `lowrank_dist.methods.Decomposition` has them; else empty.
    """

    planned: PlannedMatrix
    partition: RowPartition
    residual: dict[str, Tensor]
    factors: dict[str, Tensor]
    report: MatrixReport
    encoded_from: dict[str, Tensor] = field(default_factory=dict)


def check_matrices(plan: Plan, init: Method) -> None:
    """Raise ModelError where `init` cannot decompose a matrix of `plan`."""
    for m in plan.matrices:
        shape = {"rows": m.rows, "columns": m.columns, "rank": m.rank}
        objection = init.objection(**shape, lookup=m.lookup, wrapped=m.wrapped)
        if objection is not None:
            raise ModelError(f"{m.name}: {objection}")


class Walk:
    """Decomposes planned matrices one batch after the other, while a thread reads the rows of the next.

    Parameters
    ----------
    reader
        The checkpoint.
    group
        The ranks that keep the result.
    init, residual
        How matrices are decomposed, and how the frozen part is stored.
    factor_dtype
        Dtype of A and B.
    device
        Where matrices are decomposed.
    advance
        Called with the bytes of every matrix that is done (for a progress bar).
    statistics
        Gives the calibration statistic of a matrix, for methods that want one.
    known
        Reports of matrices, by name, that an earlier run has measured: they are not measured again.
    thorough
        Also measure the nuclear norms of quantization errors and estimate excess residuals, which may cost more than
        the decomposition.

    Notes
    -----
    Memory of `device`: two row blocks as fp32, the one in use and the next, and the temporaries of the decomposition,
    of which one is as large where residual and factors alternate, or the block in use is the mapped file or a source's
    own (else the residual takes its place); and the encoded results of a batch, twice while they are exchanged. A CPU
    lends large blocks again and again (`lowrank_dist.storage.buffers`): a residual kept in fp32 lies in one, and who
    keeps it for long had better keep a copy.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        group: ShardGroup,
        *,
        init: Method,
        residual: ResidualFormat,
        factor_dtype: torch.dtype,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
        statistics: Callable[[PlannedMatrix], Tensor] | None = None,
        known: Mapping[str, MatrixReport] | None = None,
        thorough: bool = False,
    ) -> None:
        self.reader, self.group, self.init, self.residual = reader, group, init, residual
        self.factor_dtype, self.device = factor_dtype, device or torch.device("cpu")
        self.advance, self.statistics, self.known, self.thorough = advance, statistics, known or {}, thorough
        self.measure = Measure(init, residual, thorough=thorough)

    def run(self, batches: Iterable[Batch]) -> Iterator[DecomposedMatrix]:
        """Decompose all matrices of `batches`. Collective: all ranks iterate to the end.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        """
        batches = list(batches)
        ranges = [self._rows(batch, planned) for batch in batches for planned in self._mine(batch)]
        numels = ((rows.stop - rows.start) * self.reader.info(rows.key).shape[-1] for rows in ranges)
        buffers = Buffers(max(numels, default=0))
        blocks = read_blocks(self.reader, ranges, buffers, self.device)
        for batch in batches:
            started = time.monotonic()
            measured = torch.full(self._measures_shape(batch), torch.nan, dtype=torch.float64)
            shards = []
            # one rank's trouble must not leave the ranks that work on other matrices waiting for it
            with self.group.shared_errors() if batch.group_size < self.group.size else nullcontext():
                for planned, measures in zip(self._mine(batch), measured, strict=False):
                    part = self.group.split(batch.group_size)
                    with part.shared_errors():
                        block = next(blocks)
                    # nor those that share this one, at the next
                    with part.shared_errors() if batch.group_size < self.group.size else nullcontext():
                        shards.append(self._decompose(planned, block, part, measures, buffers))
                    del block
            yield from self._reshard(batch, shards, measured, started)
            del shards
            self.advance(sum(self.reader.info(planned.key).nbytes for planned in batch.matrices))

    def _mine(self, batch: Batch) -> tuple[PlannedMatrix, ...]:
        return batch.of_rank(self.group.rank, self.group.size)

    def _measures_shape(self, batch: Batch) -> tuple[int, int]:
        """A row for every matrix of the rank that has most of `batch`: see `_decompose`; the spectrum."""
        return len(batch.of_rank(0, self.group.size)), 1 + measures_of(max(m.rank for m in batch.matrices))

    def _rows(self, batch: Batch, planned: PlannedMatrix) -> RowRange:
        """What this rank reads of a matrix."""
        partition = planned.row_partition(batch.group_size, block=self.residual.block)
        start, stop = partition.bounds(self.group.rank % batch.group_size)
        return RowRange(key=planned.key, start=start, stop=stop)

    def _decompose(
        self, planned: PlannedMatrix, block: RowBlock, group: ShardGroup, measures: Tensor, buffers: Buffers
    ) -> dict[str, Tensor]:
        """This rank's shards of a matrix, cut for the ranks of `group`, which share it; fills `measures`.

        The first measure says whether there are factors besides A and B that the residual was encoded from.
        """
        partition = planned.row_partition(group.size, block=self.residual.block)
        matrix = Matrix.of(
            planned,
            block.values,
            group,
            partition=partition,
            factor_dtype=self.factor_dtype,
            spare=block.spare,
            statistic=None if self.statistics is None else self.statistics(planned),
            thorough=self.thorough,
            buffers=buffers,
        )
        measured = planned.name not in self.known
        before = self.measure.before(matrix) if measured else {}
        decomposition = self.init.decompose(matrix, self.residual)
        shards = decomposition.residual.shards | self._factor_shards(planned, partition, decomposition.factors, group)
        if decomposition.encoded_from is not None:
            further = self._factor_shards(planned, partition, decomposition.encoded_from, group)
            shards |= {_ENCODED_FROM[name]: shard for name, shard in further.items()}
        measures[0] = decomposition.encoded_from is not None
        if measured:
            self.measure.after(matrix, decomposition, before, out=measures[1:])
        return shards

    def _factor_shards(
        self, planned: PlannedMatrix, partition: RowPartition, factors: Factors, group: ShardGroup
    ) -> dict[str, Tensor]:
        left, right = factors.left, factors.right
        # Without padding, a rank's rows of B are its flat part of B: nothing needs to be gathered.
        rows_are_shard = not planned.input_first and partition.padded_rows == partition.rows
        if not rows_are_shard:
            left = whole_left(left, partition, group)
        a, b = (left.mT, right.mT) if planned.input_first else (right, left)
        shards = {}
        for name, factor in zip(FACTORS, (a, b), strict=True):
            shard = factor.flatten()
            if not (rows_are_shard and name == "lora_B"):
                shard = shard[slice(*FlatPartition(numel=shard.numel(), world_size=group.size).bounds(group.rank))]
            shards[name] = shard.to(self.factor_dtype)
        return shards

    def _reshard(
        self, batch: Batch, shards: list[dict[str, Tensor]], measured: Tensor, started: float
    ) -> Iterator[DecomposedMatrix]:
        every, cut = measured, shards
        if batch.group_size < self.group.size:
            rows = self.group.gather_equal(measured[None].to(self.group.device)).cpu()
            # of the first of the ranks that had it, in the order of the matrices
            every = rows[:: batch.group_size].transpose(0, 1).flatten(0, 1)
            layouts = [
                self._layout(planned, batch.group_size, encoded_from=bool(row[0] == 1))
                for planned, row in zip(batch.matrices, every, strict=False)
            ]
            cut = redistribute(shards, layouts, batch.group_size, self.group)
        for index, (planned, mine) in enumerate(zip(batch.matrices, cut, strict=True)):
            seconds = (time.monotonic() - started) / len(batch.matrices)
            yield DecomposedMatrix(
                planned=planned,
                partition=planned.row_partition(self.group.size, block=self.residual.block),
                residual={name: mine[name] for name in self._storages(planned, self.group.size)},
                factors={name: mine[name] for name in FACTORS},
                encoded_from={name: mine[key] for name, key in _ENCODED_FROM.items() if key in mine},
                report=replace(
                    self._report(planned, every[index, 1:]),
                    seconds=seconds,
                    nbytes=self.reader.info(planned.key).nbytes,
                    group_size=batch.group_size,
                ),
            )

    def _report(self, planned: PlannedMatrix, measured: Tensor) -> MatrixReport:
        if planned.name in self.known:
            return replace(self.known[planned.name], digest=None)
        return report_of(planned, measured)

    def _storages(self, planned: PlannedMatrix, size: int) -> dict[str, Storage]:
        """The tensors of the encoded residual as `size` ranks cut them."""
        return dict(self.residual.storages(planned.row_partition(size, block=self.residual.block)))

    def _layout(
        self, planned: PlannedMatrix, group_size: int, *, encoded_from: bool
    ) -> dict[str, tuple[Storage, Storage]]:
        """Every flat tensor of a decomposed matrix, as a group of `group_size` ranks and as all ranks cut it."""
        both = []
        for size in (group_size, self.group.size):
            storages = self._storages(planned, size)
            for name, shape in planned.factor_shapes.items():
                flat = FlatPartition(numel=shape[0] * shape[1], world_size=size)
                of_factor = Storage(numel=flat.numel, shard_numel=flat.shard_numel, dtype=self.factor_dtype)
                storages[name] = of_factor
                if encoded_from:
                    storages[_ENCODED_FROM[name]] = of_factor
            both.append(storages)
        return {name: (storage, both[1][name]) for name, storage in both[0].items()}


class Calibrated(Protocol):
    """A walk that looks at data first (`lowrank_dist.calibration.walk.CalibrationPass`)."""

    def fingerprint(self) -> str:
        """Digest of the data, and of what is done with them. Collective."""

    def walk(self, matrices: Sequence[PlannedMatrix]) -> Walk:
        """What decomposes `matrices`, once the data have been looked at. Collective."""
