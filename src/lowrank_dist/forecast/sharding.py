"""Choice of the ranks that share the frozen parameters: no more than memory asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowrank_dist.forecast.activations import Activations, measure_activations
from lowrank_dist.forecast.job import ModelShapes, RunSpec, ShardWithin
from lowrank_dist.forecast.memory import memory

#: Share of the limit that `choose_sharding` leaves free.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class ShardingChoice:
    """Who shares the frozen parameters, and why.

    Attributes
    ----------
    within
        The smallest group of ranks within which the run fits with a margin of `MARGIN`; the world if none does.
    peaks
        Forecast peak of a rank's device by alternative, in bytes. The smallest group comes first.
    limit
        Bytes of a device available to the run; None: unknown.
    """

    within: ShardWithin
    peaks: Mapping[ShardWithin, int]
    limit: int | None

    def __str__(self) -> str:
        peaks = ", ".join(f"{within} {peak / 1e9:.1f} GB" for within, peak in self.peaks.items())
        if self.limit is None:
            return f"{self.within} (forecast peaks: {peaks}; the memory of the device is unknown)"
        return f"{self.within} (forecast peaks: {peaks}; {self.limit / 1e9:.1f} GB available, {MARGIN:.0%} kept free)"


def alternatives(job: RunSpec) -> list[ShardWithin]:
    """Groups of different sizes that could share the frozen parameters, the smallest first."""
    found: dict[int, ShardWithin] = {job.ranks: "world"}
    if job.nodes > 1:
        found.setdefault(job.gpus_per_node, "node")
    found.setdefault(1, "rank")
    return [found[size] for size in sorted(found)]


def choose_sharding(
    shapes: ModelShapes, job: RunSpec, limit: int | None, activations: Activations | None = None
) -> ShardingChoice:
    """Choose the smallest group of ranks within which `job` fits. Reads, sends and allocates nothing.

    Parameters
    ----------
    shapes
        Shapes of the model.
    job
        Settings of the run; `shard_within` is ignored.
    limit
        Bytes of a device available to the run. None: unknown, and all ranks share.
    activations
        Those of one sequence, if they have been measured.
    """
    if activations is None:
        activations = measure_activations(shapes.backbone, length=job.length, dtype=job.compute_dtype)
    peaks = {
        within: memory(shapes, replace(job, shard_within=within), activations.times(job.batch_size)).peak
        for within in alternatives(job)
    }
    fitting = [within for within, peak in peaks.items() if limit is not None and peak <= (1 - MARGIN) * limit]
    return ShardingChoice(within=fitting[0] if fitting else "world", peaks=peaks, limit=limit)
