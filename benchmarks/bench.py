"""What the tables share: the settings of a run, and every measurement that was made in it, once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import models
from costs import Host, measure_host
from peers import PeftOutcome, measure_peft, time_peft
from ranks import run_alone, run_ranks
from walks import Outcome, RunSpec, measure_walk, reports_of, time_walk

from lowrank_dist.decomposition.report import MatrixReport

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how long that may take.

    Attributes
    ----------
    model
        Directory of the checkpoint of the model tables.
    scratch
        Directory for synthetic matrices.
    rank, layer_rank
        r of the model's tables, and of the tables of single layers and matrices.
    ranks
        Processes of one thread that share the work; PEFT has one process with as many threads.
    repeats, budget
        At most so many timed repeats of each measurement, as long as they take less than `budget` seconds.
    tiny
        Random matrices of a few rows: a dry run.
    large
        The layer of a 70B model too.
    """

    model: Path
    scratch: Path
    rank: int = 64
    layer_rank: int = 128
    ranks: int = 2
    repeats: int = 3
    budget: float = 60.0
    tiny: bool = False
    large: bool = False

    def rounds(self, wanted: int) -> int:
        """In which everything takes turns."""
        return 1 if self.tiny else wanted


@dataclass
class Bench:
    """The measurements of a run; each is made when a table first asks for it."""

    settings: Settings
    _known: dict[Any, Any] = field(default_factory=dict)

    def timed(self, job: RunSpec, ranks: int) -> list[Outcome]:
        """`job` on `ranks` processes, with excess residuals where its factors are leading triplets of W itself."""
        return self.walk(job, ranks, scored=getattr(job.method, "quantization_iterations", 1) == 1)

    def walk(self, job: RunSpec, ranks: int, *, scored: bool) -> list[Outcome]:
        """`job` on `ranks` processes, by rank; `scored`: with the excess residuals."""
        best = self.best(job.checkpoint, job.rank) if scored else None
        s = self.settings
        return self._once(
            f"ours: {described(job)}, {ranks} rank{'s'[: ranks > 1]}",
            (job, ranks, scored),
            lambda: run_ranks(ranks, measure_walk, job, s.repeats, s.budget, best),
        )

    def reports(self, job: RunSpec, ranks: int) -> list[MatrixReport]:
        """What `job` reports, from one run that is not timed."""
        label = f"reports: {described(job)}"
        return self._once(label, ("reports", job, ranks), lambda: run_ranks(ranks, reports_of, job)[0])

    def speed_ups(self, jobs: Sequence[RunSpec], ranks: int, rounds: int) -> tuple[list[float], list[list[float]]]:
        """How many times as fast each of `jobs` is on `ranks` processes as the first on one, in every round.

        Before them, how many times as much `ranks` processes get done that have nothing to do with each other: what
        the machine has, whose memory, caches and clock they share.

        In a round all run once, one after the other in processes of their own: a machine that is slower for a while is
        so for each of them.
        """

        def one_round() -> tuple[float, list[float]]:
            alone = run_alone(time_walk, jobs[0])
            apart = max(run_ranks(ranks, time_walk, jobs[0], group=False))
            return ranks * alone / apart, [alone / run_ranks(ranks, time_walk, job)[0] for job in jobs]

        label = f"speed-up, {', '.join(described(job) for job in jobs)}, {rounds} rounds"
        found = self.note(label, lambda: [one_round() for _ in range(rounds)])
        ceilings, faster = zip(*found, strict=True)
        return list(ceilings), [list(of_job) for of_job in zip(*faster, strict=True)]

    def time_shares(self, jobs: Sequence[RunSpec], inits: Sequence[str], rounds: int) -> dict[str, list[list[float]]]:
        """The share of the time of each of PEFT's `inits` that each of `jobs` takes on all ranks, in every round."""
        ranks, first = self.settings.ranks, jobs[0]

        def one_round() -> list[list[float]]:
            theirs = [run_alone(time_peft, first.checkpoint, first.rank, init, threads=ranks) for init in inits]
            ours = [run_ranks(ranks, time_walk, job)[0] for job in jobs]
            return [[mine / other for mine in ours] for other in theirs]

        found = self.note(f"times beside PEFT's, {rounds} rounds", lambda: [one_round() for _ in range(rounds)])
        by_init = zip(*found, strict=True)
        return {
            init: [list(of_job) for of_job in zip(*turns, strict=True)]
            for init, turns in zip(inits, by_init, strict=True)
        }

    def peft(self, checkpoint: Path, rank: int, init: str) -> PeftOutcome:
        """PEFT's `init` in one process."""
        best, s = self.best(checkpoint, rank), self.settings
        return self._once(
            f"PEFT {init}, {checkpoint.name}",
            (checkpoint, rank, init),
            lambda: run_alone(measure_peft, checkpoint, rank, init, s.repeats, s.budget, best, threads=s.ranks),
        )

    def best(self, checkpoint: Path, rank: int) -> Mapping[str, float]:
        """The smallest residuals of all matrices of a checkpoint."""
        return self._once(
            f"exact singular values, {checkpoint.name}",
            (checkpoint, rank),
            lambda: run_alone(models.best_residuals, checkpoint, rank, threads=self.settings.ranks),
        )

    def host(self, ranks: int) -> Host:
        """Rates of this machine with `ranks` busy processes."""
        side = 256 if self.settings.tiny else 2048
        return self._once(
            f"rates of the machine, {ranks} ranks",
            ("host", ranks),
            lambda: run_ranks(ranks, measure_host, self.settings.model, side)[0],
        )

    def layer(self, name: str, shapes: models.ModelShapes) -> Path:
        """The synthetic checkpoint of one layer."""
        path = self.settings.scratch / name
        return self._once(f"writing {name}", path, lambda: models.save_layer(path, shapes))

    def layer_8b(self) -> Path:
        return self.layer("llama3-8b-layer", models.TINY_LAYER if self.settings.tiny else models.LLAMA_8B)

    def note(self, label: str, make: Callable[[], _Result]) -> _Result:
        """``make()``, with a line of progress on stderr."""
        print(f"  {label} ...", end=" ", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            return make()
        finally:
            print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    def _once(self, label: str, key: Any, make: Callable[[], _Result]) -> _Result:
        if key not in self._known:
            self._known[key] = self.note(label, make)
        return self._known[key]


def described(job: RunSpec) -> str:
    """What `job` does, without options that have their default values."""
    changed = [
        f"{f.name}={getattr(job.method, f.name)}"
        for f in fields(job.method)
        if getattr(job.method, f.name) != f.default
    ]
    shared = ", rows shared" if job.ranks_per_matrix else ""
    method = f"{type(job.method).__name__}({', '.join(changed)})"
    return f"{job.checkpoint.name}, {method}, r = {job.rank}, {type(job.residual).__name__}{shared}"
