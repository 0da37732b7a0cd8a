"""A cost model of the walk: reading, products, eigenvalue problems, collectives, quantization and writing.

A batch of the schedule takes as long as its slowest group of ranks. For a matrix over s ranks::

    products     Method.work: sharded / s and replicated flops at the GEMM rate
    small        10 D^3 flops of every D x D eigenvalue problem, at the LAPACK rate of one rank
    communicate  collectives x latency + bytes / bandwidth over s ranks
    encode       elements / s for every pass that quantizes and measures

Blocks are read ahead, and writing comes after: in memory = max(read, the rest), total = in memory + write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from lowrank_dist.decomposition.schedule import Machine, Sharding, plan_schedule
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.methods.base import Method, Work
from lowrank_dist.methods.frozen import method_for
from lowrank_dist.methods.principal import PrincipalMethod
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat

OTHER_COLLECTIVES = 4  # per matrix, outside its decomposition: two checks for errors, norms, measurements
ENCODING_COLLECTIVES = 3  # per encoding with double quantization


@dataclass(frozen=True, kw_only=True)
class Host:
    """Rates of one rank while all ranks work, and of their communication; those of the slowest rank.

    Attributes
    ----------
    machine
        Rates of the schedule's cost model: products, latency and bandwidth of all-reduces.
    gemm
        flop/s of a large square fp32 product.
    lapack
        flop/s of a symmetric eigenvalue problem of 512 x 512, counted as 10 D^3.
    raw_read
        bytes/s of reading files, which may be in the page cache.
    read
        bytes/s of reading rows of pretrained weights, converting them to fp32 and checking them for NaN.
    encode
        elements/s of forming, encoding and measuring a residual, by format.
    """

    machine: Machine
    gemm: float
    lapack: float
    raw_read: float
    read: float
    encode: Mapping[str, float]


@dataclass(kw_only=True)
class Seconds:
    """Predicted seconds by kind of work."""

    read: float = 0.0
    products: float = 0.0
    small: float = 0.0
    communicate: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    @property
    def in_memory(self) -> float:
        return max(self.read, self.products + self.small + self.communicate + self.encode)

    @property
    def total(self) -> float:
        return self.in_memory + self.write

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def predict(
    matrices: Sequence[PlannedMatrix],
    method: Method,
    residual: ResidualFormat,
    host: Host,
    ranks: int,
    *,
    sharding: Sharding | None = None,
    read: float,
    write: float = math.inf,
) -> Seconds:
    """Predict the seconds of a walk over bf16 `matrices`; `read` and `write` are bytes/s of all ranks together."""
    group = ShardGroup.single()
    group.size = ranks  # with a given machine, `plan_schedule` needs only the size
    schedule = plan_schedule(matrices, method, residual, group, sharding=sharding, machine=host.machine)
    elements = sum(m.rows * m.columns for m in matrices)
    total = Seconds(read=2 * elements / read, write=decomposed_bytes(matrices, residual) / write)
    for batch in schedule.batches:
        costs = [
            sum((_matrix_seconds(m, method, residual, host, batch.group_size) for m in mine), Seconds())
            for mine in (batch.of_rank(rank, ranks) for rank in range(0, ranks, batch.group_size))
        ]
        total += max(costs, key=lambda cost: cost.in_memory)
    return total


def decomposed_bytes(matrices: Sequence[PlannedMatrix], residual: ResidualFormat) -> int:
    """Bytes of decomposed matrices on disk: residuals and 2-byte factors."""
    return sum(_residual_bytes(m, residual) + 2 * m.rank * (m.rows + m.columns) for m in matrices)


def _residual_bytes(matrix: PlannedMatrix, residual: ResidualFormat) -> int:
    """Bytes of a residual on disk; dense ones are counted as 2 bytes an element."""
    residual = residual.of_matrix(matrix.key)
    if residual.exact:
        return 2 * matrix.rows * matrix.columns
    storages = residual.storages(matrix.row_partition(1, block=residual.block)).values()
    return sum(storage.numel * storage.dtype.itemsize for storage in storages)


def _matrix_seconds(matrix: PlannedMatrix, method: Method, residual: ResidualFormat, host: Host, ranks: int) -> Seconds:
    work = method_for(matrix, method).work(matrix.rows, matrix.columns, matrix.rank)
    elements, small = matrix.rows * matrix.columns, sum(10.0 * d**3 for d in dimensions(matrix, method))
    decompositions = 1 + _refinements(method)
    # one product B A for each residual, and one for the measurements
    sharded = work.sharded_flops + 2.0 * elements * matrix.rank * (decompositions + 1)
    replicated = max(0.0, work.replicated_flops - small)
    encodings = 1 if residual.exact else _rounds(method) + 1  # W is encoded once more to measure its error
    others = OTHER_COLLECTIVES + (0 if residual.exact else ENCODING_COLLECTIVES * encodings)
    messages = Work(collectives=work.collectives + others, reduced_bytes=work.reduced_bytes)
    return Seconds(
        products=(sharded / ranks + replicated) / host.machine.flops,
        small=small / host.lapack,
        communicate=host.machine.seconds(messages, ranks),
        encode=encodings * elements / ranks / host.encode[str(residual)],
    )


def dimensions(matrix: PlannedMatrix, method: Method) -> list[int]:
    """Sizes of the eigenvalue problems of a matrix, one per decomposition; empty for methods without an SVD."""
    if not isinstance(method, PrincipalMethod):
        return []
    short, tall = min(matrix.rows, matrix.columns), matrix.rows >= matrix.columns
    first = matrix.rank + (3 * matrix.rank if method.oversampling is None else method.oversampling)
    share = 2 / 3 if tall else 1
    return [short if d >= share * short else d for d in (first, *[2 * matrix.rank] * _refinements(method))]


def _rounds(method: Method) -> int:
    return getattr(method, "quantization_iterations", 1)


def _refinements(method: Method) -> int:
    return getattr(method, "refinements", 0)
