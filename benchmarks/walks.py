"""This package, measured: functions that every rank runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from meters import Flops, PeakMemory, Traffic, repeat, residual_norm, seconds_of
from models import planned
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.schedule import Sharding, plan_schedule
from lowrank_dist.decomposition.walk import FACTORS, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.linalg import randomized_svd
from lowrank_dist.methods import Method, PiSSA
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.reader import CheckpointReader

FP32 = Dense(dtype=torch.float32)
Keep = Callable[[PlannedMatrix, dict[str, Tensor]], object]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A walk over all matrices of a checkpoint."""

    checkpoint: Path
    rank: int
    method: Method = PiSSA()  # noqa: RUF009 (frozen)
    residual: ResidualFormat = FP32
    ranks_per_matrix: int | None = None
    thorough: bool = False


@dataclass(kw_only=True)
class Outcome:
    """What one rank measured; MB where nothing else is said."""

    setup: float
    seconds: list[float]
    private: float
    resident: float
    schedule: str = ""
    bytes_read: int = 0
    sent: float = 0.0
    flops: int = 0
    reports: list[MatrixReport] = field(default_factory=list)
    excess: dict[str, float] = field(default_factory=dict)


class _Runner:
    """Runs a job again and again; what comes out is dropped, but for the factors if they are wanted."""

    def __init__(self, job: RunSpec, group: ShardGroup) -> None:
        self.job, self.group = job, group
        self.matrices = planned(job.checkpoint, CheckpointReader(job.checkpoint), job.rank)

    def run(self, *meters: AbstractContextManager[object], keep: Keep = lambda *_: None) -> None:
        """Schedule and walk; `meters` count what the walk itself does, `keep` gets the factors."""
        job, reader = self.job, CheckpointReader(self.job.checkpoint)
        walk = Walk(
            reader,
            self.group,
            init=job.method,
            residual=job.residual,
            factor_dtype=torch.float32,
            thorough=job.thorough,
        )
        sharding = Sharding(ranks_per_matrix=job.ranks_per_matrix)
        self.schedule = plan_schedule(self.matrices, job.method, job.residual, self.group, sharding=sharding)
        self.reports = []
        with ExitStack() as stack:
            for meter in meters:
                stack.enter_context(meter)
            for matrix in walk.run(self.schedule.batches):
                self.reports.append(matrix.report)
                keep(matrix.planned, matrix.factors)
                del matrix  # before the next one is decomposed
        self.bytes_read = reader.bytes_read
        reader.close()


def measure_walk(job: RunSpec, repeats: int, budget: float, best: Mapping[str, float] | None) -> Outcome:
    """Time, memory and counts of a walk, and with `best` residuals the excess of each matrix (on rank 0)."""
    group = ShardGroup()
    with PeakMemory() as memory:
        runners: list[_Runner] = []
        setup = seconds_of(lambda: runners.append(_Runner(job, group)))
        runner = runners[0]
        first = seconds_of(runner.run)
    seconds = repeat(lambda _: runner.run(), repeats=repeats, budget=budget, first=first, group=group)
    kept: list[tuple[PlannedMatrix, dict[str, Tensor]]] = []
    traffic, flops = Traffic(), Flops()
    runner.run(traffic, flops, keep=lambda matrix, factors: kept.append((matrix, factors)))
    return Outcome(
        setup=setup,
        seconds=seconds,
        private=memory.private,
        resident=memory.resident,
        schedule=str(runner.schedule),
        bytes_read=runner.bytes_read,
        sent=traffic.sent,
        flops=flops.total,
        reports=runner.reports,
        excess={} if best is None else {m.key: _excess(m, f, job, group, best[m.key]) for m, f in kept},
    )


def time_walk(job: RunSpec) -> float:
    """Seconds of one run on the slowest rank, after one to warm up."""
    group = ShardGroup()
    runner = _Runner(job, group)
    runner.run()
    return repeat(lambda _: runner.run(), repeats=1, budget=math.inf, group=group)[0]


def reports_of(job: RunSpec) -> list[MatrixReport]:
    """What one run of a job reports."""
    runner = _Runner(job, ShardGroup())
    runner.run()
    return runner.reports


def _excess(
    matrix: PlannedMatrix, factors: Mapping[str, Tensor], job: RunSpec, group: ShardGroup, best: float
) -> float:
    """Excess residual of one matrix, on rank 0; NaN elsewhere."""
    whole = {}
    for name in FACTORS:
        shape = matrix.factor_shapes[name]
        whole[name] = group.gather_equal(factors[name])[: math.prod(shape)].view(shape)
    if group.rank:
        return math.nan
    reader = CheckpointReader(job.checkpoint)
    norm = residual_norm(
        lambda start, stop: reader.rows(matrix.key, start, stop), whole["lora_B"], whole["lora_A"], matrix.scaling
    )
    return norm / best - 1


@dataclass(kw_only=True)
class SVDOutcome:
    """What one rank measured of an SVD; `excess` on rank 0."""

    seconds: list[float]
    sent: float
    excess: float


def measure_svd(
    path: Path, rank: int, options: Mapping[str, float], repeats: int, budget: float, best: float
) -> SVDOutcome:
    """`randomized_svd` of the tensor ``weight`` of a safetensors file, its rows in memory already."""
    group = ShardGroup()
    with safe_open(path, "pt") as file:
        weight = file.get_slice("weight")
        rows, columns = weight.get_shape()
        start, stop = RowPartition(rows=rows, columns=columns, world_size=group.size).bounds(group.rank)
        block = weight[start:stop]

    def decompose() -> tuple[Tensor, Tensor, Tensor]:
        return randomized_svd(block, rank, rows=rows, group=group, seed=0, **options)[:3]  # type: ignore[arg-type]

    first = seconds_of(decompose)
    seconds = repeat(lambda _: decompose(), repeats=repeats, budget=budget, first=first, group=group)
    with Traffic() as traffic:
        u, s, vh = decompose()
    squared = residual_norm(lambda start, stop: block[start:stop], u * s, vh) ** 2
    norm = float(group.sum(torch.tensor(squared, dtype=torch.float64))) ** 0.5
    return SVDOutcome(seconds=seconds, sent=traffic.sent, excess=norm / best - 1)
