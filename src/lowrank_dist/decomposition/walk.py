"""The walk: reads matrices of the pretrained weights and returns them decomposed and sharded over all ranks.

Every rank reads its own rows of a matrix, decomposes them together with the other ranks and encodes its rows of the
residual. Either all ranks share a matrix, or each matrix of a batch belongs to a part of the ranks
(`lowrank_dist.decomposition.schedule` decides); one all-to-all then reshards the results of the batch for all ranks.
Either way the ranks together read every byte once, and the result is the same.
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
from lowrank_dist.distributed.partition import FlatPartition, FlatStorage, RowPartition
from lowrank_dist.distributed.reshard import redistribute, whole_left
from lowrank_dist.errors import ModelError
from lowrank_dist.methods.base import Factors, Matrix, Method
from lowrank_dist.methods.frozen import method_for
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.parse import printable
from lowrank_dist.storage.prefetch import RowBlock, RowRange, read_blocks
from lowrank_dist.storage.reader import CheckpointReader

FACTORS = ("lora_A", "lora_B")
_ENCODED_FROM = {name: f"encoded_from.{name}" for name in FACTORS}  # names among a matrix's shards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Matrices whose results are resharded together.

    Every `group_size` consecutive ranks share a matrix. If there are more matrices than such groups, each group takes
    several in turn. Nothing is resharded if `group_size` is the number of ranks.
    """

    group_size: int
    matrices: tuple[PlannedMatrix, ...]

    def of_rank(self, rank: int, world_size: int) -> tuple[PlannedMatrix, ...]:
        """The matrices that `rank` works on, in order."""
        return self.matrices[rank // self.group_size :: world_size // self.group_size]


@dataclass(frozen=True, kw_only=True)
class DecomposedMatrix:
    """One matrix as this rank keeps it.

    Attributes
    ----------
    planned
        The matrix in the plan.
    partition
        How its rows are sharded over all ranks.
    residual
        This rank's flat shards of the encoded residual, by storage name.
    factors
        This rank's flat shards of A ``[r, in]`` (``lora_A``) and B ``[out, r]`` (``lora_B``), possibly padded; none if
        the matrix has no adapter (rank 0).
    report
        The measures, the same on every rank except for `seconds`.
    encoded_from
        Flat shards, like `factors`, of ``encoded_from`` of the `lowrank_dist.methods.Decomposition`; empty if that is
        None.
    """

    planned: PlannedMatrix
    partition: RowPartition
    residual: dict[str, Tensor]
    factors: dict[str, Tensor]
    report: MatrixReport
    encoded_from: dict[str, Tensor] = field(default_factory=dict)


def check_matrices(plan: Plan, init: Method) -> None:
    """Raise ModelError if `init` cannot decompose a matrix of `plan`."""
    for m in plan.matrices:
        shape = {"rows": m.rows, "columns": m.columns, "rank": m.rank}
        objection = method_for(m, init).objection(**shape, lookup=m.lookup, wrapped=m.wrapped)
        if objection is not None:
            raise ModelError(f"{m.name}: {objection}")


class Walk:
    """Decomposes planned matrices one batch after the other, while a thread reads the rows of the next.

    Parameters
    ----------
    reader
        Reader of the pretrained weights.
    group
        The ranks that keep the result.
    init, residual
        How matrices are decomposed, and how the residual is stored.
    factor_dtype
        Dtype of A and B.
    device
        Device that matrices are decomposed on; the CPU by default.
    advance
        Called with the bytes of every batch of matrices that is done (for a progress bar).
    statistics
        Returns the calibration statistic of a matrix, for methods that need one.
    known
        Reports of an earlier run, by the name of the matrix. These matrices are not measured again.
    thorough
        Also measure the nuclear norms of quantization errors and estimate excess residuals, which may cost more than
        the decomposition.

    Notes
    -----
    `device` holds two row blocks in fp32, the one in use and the next; the temporaries of the decomposition; and the
    encoded results of a batch, twice while they are resharded. One temporary is as large as a row block if the method
    alternates between residual and factors, or if the block in use is the mapped file or belongs to a weight source.
    Otherwise the residual overwrites the block. Large blocks on the CPU are reused
    (`lowrank_dist.storage.buffers`), and a residual in fp32 lies in one: copy it to keep it past the next matrix.
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
            # an error on one rank must reach the ranks that work on other matrices, which would wait for it
            with self.group.shared_errors() if batch.group_size < self.group.size else nullcontext():
                for planned, measures in zip(self._mine(batch), measured, strict=False):
                    part = self.group.split(batch.group_size)
                    with part.shared_errors():
                        block = next(blocks)
                    # and the ranks that share this matrix, which would wait for it at the next one
                    with part.shared_errors() if batch.group_size < self.group.size else nullcontext():
                        shards.append(self._decompose(planned, block, part, measures, buffers))
                    del block
            yield from self._reshard(batch, shards, measured, started)
            del shards
            self.advance(sum(self.reader.info(planned.key).nbytes for planned in batch.matrices))

    def _mine(self, batch: Batch) -> tuple[PlannedMatrix, ...]:
        return batch.of_rank(self.group.rank, self.group.size)

    def _measures_shape(self, batch: Batch) -> tuple[int, int]:
        """Rows for the largest number of matrices of a rank; columns for the flag of `_decompose` and the measures."""
        return len(batch.of_rank(0, self.group.size)), 1 + measures_of(max(m.rank for m in batch.matrices))

    def _rows(self, batch: Batch, planned: PlannedMatrix) -> RowRange:
        """The rows of a matrix that this rank reads."""
        partition = self._partition(planned, batch.group_size)
        start, stop = partition.bounds(self.group.rank % batch.group_size)
        return RowRange(key=planned.key, start=start, stop=stop)

    def _decompose(
        self, planned: PlannedMatrix, block: RowBlock, group: ShardGroup, measures: Tensor, buffers: Buffers
    ) -> dict[str, Tensor]:
        """Return this rank's shards of a matrix over `group`, the ranks that share it; fill `measures`.

        The first measure is a flag: whether the residual was encoded from factors other than A and B.
        """
        residual, partition = self.residual.of_matrix(planned.key), self._partition(planned, group.size)
        matrix = Matrix.of(
            planned,
            block.values,
            group,
            partition=partition,
            factor_dtype=self.factor_dtype,
            spare=block.spare,
            statistic=None if self.statistics is None or planned.rank == 0 else self.statistics(planned),
            thorough=self.thorough,
            buffers=buffers,
        )
        init, measured = method_for(planned, self.init), planned.name not in self.known
        measure = Measure(init, residual, thorough=self.thorough)
        before = measure.before(matrix) if measured else {}
        try:
            decomposition = init.decompose(matrix, residual)
        except torch.linalg.LinAlgError as error:
            raise ModelError(
                f"{planned.name}: {init} cannot decompose the {planned.rows} x {planned.columns} matrix "
                f"({printable(error)}); {'calibrate on other data, or ' if init.statistic else ''}"
                "drop it from target_modules"
            ) from error
        shards = decomposition.residual.shards | factor_shards(
            planned, partition, decomposition.factors, group, self.factor_dtype
        )
        if decomposition.encoded_from is not None:
            further = factor_shards(planned, partition, decomposition.encoded_from, group, self.factor_dtype)
            shards |= {_ENCODED_FROM[name]: shard for name, shard in further.items()}
        measures[0] = decomposition.encoded_from is not None
        if measured:
            measure.after(matrix, decomposition, before, out=measures[1:])
        return shards

    def _reshard(
        self, batch: Batch, shards: list[dict[str, Tensor]], measured: Tensor, started: float
    ) -> Iterator[DecomposedMatrix]:
        every, cut = measured, shards
        if batch.group_size < self.group.size:
            rows = self.group.gather_equal(measured[None].to(self.group.device)).cpu()
            # the measures of a matrix come from the first rank of its group; in the order of the matrices
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
                partition=self._partition(planned, self.group.size),
                residual={name: mine[name] for name in self._storages(planned, self.group.size)},
                factors={name: mine[name] for name in planned.factor_names},
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

    def _partition(self, planned: PlannedMatrix, size: int) -> RowPartition:
        """The rows of a matrix as `size` ranks shard them."""
        return planned.row_partition(size, block=self.residual.of_matrix(planned.key).block)

    def _storages(self, planned: PlannedMatrix, size: int) -> dict[str, FlatStorage]:
        """The tensors of the encoded residual as `size` ranks shard them."""
        return dict(self.residual.of_matrix(planned.key).storages(self._partition(planned, size)))

    def _layout(
        self, planned: PlannedMatrix, group_size: int, *, encoded_from: bool
    ) -> dict[str, tuple[FlatStorage, FlatStorage]]:
        """Every flat tensor of a decomposed matrix, as a group of `group_size` ranks and as all ranks shard it."""
        both = []
        for size in (group_size, self.group.size):
            storages = self._storages(planned, size)
            for name, shape in planned.factor_shapes.items():
                flat = FlatPartition(numel=shape[0] * shape[1], world_size=size)
                of_factor = FlatStorage(numel=flat.numel, shard_numel=flat.shard_numel, dtype=self.factor_dtype)
                storages[name] = of_factor
                if encoded_from:
                    storages[_ENCODED_FROM[name]] = of_factor
            both.append(storages)
        return {name: (storage, both[1][name]) for name, storage in both[0].items()}


def factor_shards(
    planned: PlannedMatrix, partition: RowPartition, factors: Factors, group: ShardGroup, dtype: torch.dtype
) -> dict[str, Tensor]:
    """This rank's flat shards of A and B in `dtype`, by name. Collective where B has to be gathered."""
    if planned.rank == 0:
        return {}
    left, right = factors.left, factors.right
    # without padding a rank's rows of B are its flat shard of B, so that nothing needs to be gathered
    rows_are_shard = not planned.input_first and partition.padded_rows == partition.rows
    if not rows_are_shard:
        left = whole_left(left, partition, group)
    a, b = (left.mT, right.mT) if planned.input_first else (right, left)
    shards = {}
    for name, factor in zip(FACTORS, (a, b), strict=True):
        shard = factor.flatten()
        if not (rows_are_shard and name == "lora_B"):
            shard = shard[slice(*FlatPartition(numel=shard.numel(), world_size=group.size).bounds(group.rank))]
        shards[name] = shard.to(dtype)
    return shards


class Calibrated(Protocol):
    """A walk that follows a calibration pass (`lowrank_dist.calibration.walk.CalibrationPass`)."""

    def fingerprint(self) -> str:
        """Return a digest of the calibration data and its settings. Collective."""

    def walk(self, matrices: Sequence[PlannedMatrix]) -> Walk:
        """Run the calibration pass and return the walk that decomposes `matrices`. Collective."""
