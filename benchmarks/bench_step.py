"""A training step of SmolLM2-135M on the CPU, beside PEFT: seconds and memory. A Markdown report.

    python benchmarks/bench_step.py           # benchmarks/results/step.md
    python benchmarks/bench_step.py --tiny    # a dry run on a random model of two layers

Every way runs in processes of its own, all ways by turns. Two ranks share the tokens of a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import models
from meters import PeakMemory
from ranks import run_ranks
from reporting import ROOT, table, verdict
from steps import DENSE, OURS, TWO, Measured, RunSpec, Train, by_turns, parser, report, trainers, ways

from lowrank_dist.demo.assets import fetch_model

WAYS = ways("measured")
MEMORY_GOAL = 0.6  # of PEFT's dense LoRA, whose time is the other goal


class Run:
    """One way in a fresh process; counts the calls of its clock, two a step, to know when the timed steps begin."""

    def __init__(self, train: Train, job: RunSpec) -> None:
        self._train, self._job, self._calls = train, job, 0

    def __call__(self) -> tuple[Measured, float]:
        """The steps, and the peak of private memory in the timed ones above that at the start, in MB."""
        with PeakMemory() as self._memory:
            measured = self._train(replace(self._job, clock=self._clock))
        return measured, self._memory.private

    def _clock(self) -> float:
        if self._calls == 2 * trainers.WARM_UP:
            self._memory.restart()
        self._calls += 1
        return time.perf_counter()


def measure(train: Train, job: RunSpec) -> tuple[Measured, float]:
    return Run(train, job)()


def main() -> None:
    known = parser(
        __doc__,
        "step.md",
        tiny="on a random model of two layers",
        steps=f"timed steps of a round, after {trainers.WARM_UP}",
        n_steps=3,
        n_rounds=2,
    )
    known.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where SmolLM2-135M is fetched to")
    known.add_argument("--tokens", type=int, default=1024, help="of a step, one sequence a rank")
    known.add_argument("--rank", type=int, default=16, help="r")
    options = known.options()
    with tempfile.TemporaryDirectory() as folder:
        model = models.save_tiny_model(Path(folder) / "random-llama") if options.tiny else fetch_model(options.cache)
        job = RunSpec(
            name="SmolLM2-135M",
            checkpoint=model,
            tokens=16 if options.tiny else options.tokens,
            rank=4 if options.tiny else options.rank,
            steps=options.steps,
            device="cpu",
        )
        found: dict[str, list[tuple[float, float, list[float]]]] = {way: [] for way in WAYS}
        for way, ranks, train in by_turns(WAYS, options.rounds):
            of_ranks = run_ranks(ranks, measure, train, replace(job, tokens=job.tokens // ranks), group=ranks > 1)
            seconds = max(statistics.median(measured.seconds) for measured, _ in of_ranks)
            found[way].append((seconds, max(peak for _, peak in of_ranks), of_ranks[0][0].losses))
    notes = [
        f"adapters on all linears (r = {job.rank}), gradient checkpointing, AdamW, fp32; {job.tokens} tokens a step; "
        f"medians of {options.steps} steps, the best of {options.rounds} rounds by turns",
        "ours: NF4 with double quantization under `PiSSAStrategy`, adapters folded in where that is faster; memory: "
        "peak of a rank's private memory in the timed steps, above that before the model",
    ]
    report(options, "A training step on the CPU", "bench_step.py", notes, [_table(found, job), _verdicts(found)])


def _best(found: dict[str, list[tuple[float, float, list[float]]]], way: str) -> tuple[float, float]:
    return min(seconds for seconds, _, _ in found[way]), min(peak for _, peak, _ in found[way])


def _table(found: dict[str, list[tuple[float, float, list[float]]]], job: RunSpec) -> str:
    dense, rows = _best(found, DENSE), []
    for way, rounds in found.items():
        seconds, peak = _best(found, way)
        losses = rounds[0][2]
        rows.append(
            [
                way,
                f"{seconds:.3f}",
                f"{job.tokens / seconds:.0f}",
                f"{seconds / dense[0]:.2f}",
                f"{peak:.0f}",
                f"{peak / dense[1]:.2f}",
                f"{losses[0]:.4f} {losses[-1]:.4f}",
            ]
        )
    columns = ["", "s a step", "tokens/s", f"of {DENSE}", "peak MB", f"of {DENSE}", "loss, first and last"]
    return table(columns, rows)


def _verdicts(found: dict[str, list[tuple[float, float, list[float]]]]) -> str:
    (dense, memory), lines = _best(found, DENSE), []
    for way in (OURS, TWO):
        seconds, peak = _best(found, way)
        lines.append(
            f"- {way}: {seconds / dense:.2f} of the time of {DENSE}, goal 1: {verdict(seconds <= dense)}; "
            f"{peak / memory:.2f} of its memory, goal {MEMORY_GOAL}: {verdict(peak <= MEMORY_GOAL * memory)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
