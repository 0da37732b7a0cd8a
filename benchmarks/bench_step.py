"""A training step of SmolLM2-135M on the CPU, beside PEFT: seconds and memory. A Markdown report.

    python benchmarks/bench_step.py           # benchmarks/results/step.md
    python benchmarks/bench_step.py --tiny    # a dry run on a random model of two layers

Every way runs in processes of its own, all ways by turns. Two ranks share the tokens of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.gpu

import models  # noqa: E402
from benchmarks.gpu.trainers import WARM_UP, Measured, RunSpec, train_bitsandbytes, train_dense, train_ours  # noqa: E402
from meters import PeakMemory  # noqa: E402
from ranks import preload, run_ranks  # noqa: E402
from reporting import header, table, verdict, write_report  # noqa: E402

from lowrank_dist.demo.assets import fetch_model  # noqa: E402

PACKAGES = ("torch", "lightning", "deepspeed", "peft", "transformers", "bitsandbytes")
DENSE, PEER, OURS, TWO = "PEFT, dense", "PEFT + bitsandbytes", "ours", "ours, 2 ranks"
WAYS: dict[str, tuple[int, Callable[[RunSpec], Measured]]] = {
    DENSE: (1, train_dense),
    PEER: (1, train_bitsandbytes),
    OURS: (1, partial(train_ours, fold="measured")),
    TWO: (2, partial(train_ours, fold="measured")),
}
MEMORY_GOAL = 0.6  # of PEFT's dense LoRA, whose time is the other goal


class Run:
    """One way in a fresh process; counts the calls of its clock, two a step, to know when the timed steps begin."""

    def __init__(self, train: Callable[[RunSpec], Measured], job: RunSpec) -> None:
        self._train, self._job, self._calls = train, job, 0

    def __call__(self) -> tuple[Measured, float]:
        """The steps, and the peak of private memory in the timed ones above that at the start, in MB."""
        with PeakMemory() as self._memory:
            measured = self._train(replace(self._job, clock=self._clock))
        return measured, self._memory.private

    def _clock(self) -> float:
        if self._calls == 2 * WARM_UP:
            self._memory.restart()
        self._calls += 1
        return time.perf_counter()


def measure(train: Callable[[RunSpec], Measured], job: RunSpec) -> tuple[Measured, float]:
    return Run(train, job)()


def main() -> None:
    options = _options()
    preload("benchmarks.gpu.trainers")
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
        for _ in range(options.rounds):
            for way, (ranks, train) in WAYS.items():
                print(f"  {way} ...", file=sys.stderr, flush=True)
                of_ranks = run_ranks(ranks, measure, train, replace(job, tokens=job.tokens // ranks), group=ranks > 1)
                seconds = max(statistics.median(measured.seconds) for measured, _ in of_ranks)
                found[way].append((seconds, max(peak for _, peak in of_ranks), of_ranks[0][0].losses))
    parts = [_header(options, job), _table(found, job), _verdicts(found)]
    write_report(options.output, parts)
    print("\n\n".join(parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step.md")
    parser.add_argument("--tiny", action="store_true", help="dry run on a random model of two layers")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where SmolLM2-135M is fetched to")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, one sequence a rank")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round, after two")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.rounds = 1, 1
    return options


def _header(options: argparse.Namespace, job: RunSpec) -> str:
    notes = [
        f"adapters on all linears (r = {job.rank}), gradient checkpointing, AdamW, fp32; {job.tokens} tokens a step; "
        f"medians of {options.steps} steps, the best of {options.rounds} rounds by turns",
        "ours: NF4 with double quantization under `PiSSAStrategy`, adapters folded in where that is faster; memory: "
        "peak of a rank's private memory in the timed steps, above that before the model",
    ]
    if options.tiny:
        notes.append("a dry run on a random model of two layers: its figures mean nothing")
    return header("A training step on the CPU", "bench_step.py", PACKAGES, "ranks of one thread", notes)


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
