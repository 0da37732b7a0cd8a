"""What checkpoints cost: those of this package beside those of Lightning's DeepSpeed strategy. A Markdown report.

    python benchmarks/bench_checkpoint.py           # benchmarks/results/checkpoint.md
    python benchmarks/bench_checkpoint.py --tiny    # a dry run on a random model of two layers

One training run of one sharded model saves in every way by turns. Starts run in processes of their own; times leave out
the start of the interpreter, imports and the process group.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from meters import MB, shown
from ranks import preload, run_ranks
from reporting import ROOT, header, table, write_report
from saves import KINDS, Kind, RunSpec, Start, Step, Trained, measure_saves, measure_start

from lowrank_dist.demo.assets import fetch_model

PACKAGES = ("torch", "lightning", "deepspeed", "peft", "transformers", "bitsandbytes", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What all ranks saw: of a training run, of fresh starts, of resumed ones, of one on another number of ranks."""

    trained: list[Trained]
    fresh: list[list[Start]]
    resumed: list[list[Start]]
    elsewhere: list[Start]

    @property
    def plain(self) -> list[float]:
        """Seconds of the steps beside which nothing was written, of the slowest rank."""
        return [max(times) for times in zip(*(rank.plain for rank in self.trained), strict=True)]

    @property
    def beside(self) -> list[Step]:
        steps = zip(*(rank.beside for rank in self.trained), strict=True)
        slowest = [Step(seconds=max(s.seconds for s in step), writing=max(s.writing for s in step)) for step in steps]
        return [step for step in slowest if step.writing > 0]

    def saves(self, kind: Kind, seconds: str) -> list[float]:
        """``stall``, ``written`` or ``flushed`` of all saves, of the slowest rank."""
        ranks = [[getattr(save, seconds) for save in rank.saves[kind.label]] for rank in self.trained]
        return [max(times) for times in zip(*ranks, strict=True)]


def main() -> None:
    options = _options()
    preload("lowrank_dist.callbacks", "lowrank_dist.training.strategy", "lowrank_dist.training.module")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        model = models.save_tiny_model(scratch / "random-llama") if options.tiny else options.model
        model = model or fetch_model(options.cache)
        job = RunSpec(
            model=model,
            rank=8 if options.tiny else options.rank,
            tokens=16 if options.tiny else options.tokens,
            precision=options.precision,
        )
        top = _header(options)
        results = _measure(job, options, scratch)
    parts = [top, _saves(job, options.ranks, results), _steps(results), _starts(options.ranks, results)]
    write_report(options.output, parts, dry=options.tiny)
    print("\n\n".join(parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint.md")
    parser.add_argument("--tiny", action="store_true", help="dry run on a random model of two layers")
    parser.add_argument("--model", type=Path, help="directory of a checkpoint (default: SmolLM2-135M, fetched)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where it is fetched to")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written (default: the system's)")
    parser.add_argument("--rank", type=int, default=64, help="r")
    parser.add_argument("--tokens", type=int, default=128, help="of the one sequence of a rank's batch")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "bf16-true"])
    parser.add_argument("--ranks", type=int, default=2, help="processes that train")
    parser.add_argument("--repeats", type=int, default=5, help="timed saves of each kind")
    parser.add_argument("--starts", type=int, default=2, help="timed starts, fresh and resumed")
    options = parser.parse_args()
    if options.tiny:
        options.repeats, options.starts = min(options.repeats, 1), min(options.starts, 1)
    return options


def _header(options: argparse.Namespace) -> str:
    notes = [
        f"saves of each kind, by turns: {options.repeats}; starts of each kind: {options.starts}; seconds are minimum "
        "/ median of the slowest rank; files that are read are in the page cache"
    ]
    if options.tiny:
        notes.append("a dry run on a random model of two layers: its figures mean nothing")
    machine = f"{options.ranks} ranks of one thread"
    return header("Checkpoints: measured", "bench_checkpoint.py", PACKAGES, machine, notes)


def _measure(job: RunSpec, options: argparse.Namespace, scratch: Path) -> Results:
    def ranks(what: str, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        print(f"  {what} ...", file=sys.stderr, flush=True)
        return run_ranks(size, function, job, *args, group=True)

    directory, size = scratch / "saved", options.ranks
    trained = ranks("training and saving", size, measure_saves, options.repeats, directory)
    ours, theirs = directory / "checkpoint-0", directory / "checkpoint-3"
    fresh, resumed = [], []
    for _ in range(options.starts):
        fresh.append(ranks("a fresh start", size, measure_start, None, None))
        resumed.append(ranks("a resumed start", size, measure_start, ours, theirs))
    other = 1 if size > 1 else 2
    elsewhere = ranks(f"resuming on {other} instead of {size}", other, measure_start, ours, theirs)
    return Results(trained=trained, fresh=fresh, resumed=resumed, elsewhere=elsewhere)


def _saves(job: RunSpec, ranks: int, results: Results) -> str:
    columns = [
        "",
        "stall, s",
        "in steps",
        "written, s",
        "on disk, s",
        "MB",
        "x adapter",
        "files",
        "peak MB",
        "other number of ranks",
        "pickles",
    ]
    adapter = results.trained[0].adapter_bytes
    text = (
        f"{job.model.name}, QPiSSA with NF4, r = {job.rank} on all linears, {job.precision}, AdamW, {job.tokens} "
        f"tokens per rank and step; a step takes {shown(results.plain)} s. The adapter has {adapter / MB:.1f} MB in "
        "the dtype that it is trained in.\n\n"
        "Stall: training is held up by a save; beside it in median steps. Written: the checkpoint is complete, though "
        "it may be in the page cache only; on disk: it is flushed as well. Ours is flushed before it appears under its "
        "name; DeepSpeed does not flush (no fsync), what the benchmark then took to flush its files is added. The save "
        "in the background is written while steps go on. Peak: private memory of the largest rank above that just "
        "before, in a save that training waits for. Other number of ranks: whether a run on "
        f"{len(results.elsewhere)} instead of {ranks} could load it. Pickles: whether there are any."
    )
    rows = [_save_row(kind, results, adapter) for kind in KINDS]
    return "\n\n".join(["## Saving", text, table(columns, rows), _refusal(results)])


def _save_row(kind: Kind, results: Results, adapter: int) -> list[str]:
    stall = results.saves(kind, "stall")
    footprints = [rank.footprints[kind.label] for rank in results.trained]
    nbytes = sum(footprints[0].files.values())
    return [
        kind.label,
        shown(stall),
        f"{statistics.median(stall) / statistics.median(results.plain):.2f}",
        shown(results.saves(kind, "written")),
        shown(results.saves(kind, "flushed")),
        f"{nbytes / MB:.1f}",
        f"{nbytes / adapter:.1f}",
        str(len(footprints[0].files)),
        f"{max(footprint.private for footprint in footprints):.0f}",
        "no" if kind.lightnings and results.elsewhere[0].error else "yes",
        "yes" if footprints[0].pickled else "no",
    ]


def _refusal(results: Results) -> str:
    before, after = results.resumed[-1][0].error, results.elsewhere[0].error
    same = f"refused it: {before}" if before else "loaded it"
    other = f"refused it: {after}" if after else "loaded it too"
    return (
        f"Lightning's checkpoint with frozen parameters, into the engine of a run on as many ranks: DeepSpeed {same}. "
        f"On {len(results.elsewhere)}: it {other}"
    )


def _steps(results: Results) -> str:
    plain, beside = statistics.median(results.plain), results.beside
    text = (
        "Steps during which a checkpoint is written in the background, at least for a part of them, and steps beside "
        "which nothing is written."
    )
    rows = [["nothing is written", len(results.plain), shown(results.plain), "1.00", "-", "-"]]
    if beside:
        seconds = [step.seconds for step in beside]
        median = statistics.median(seconds)
        writing = statistics.median(step.writing for step in beside)
        rows.append(
            [
                "a checkpoint is written",
                len(beside),
                shown(seconds),
                f"{median / plain:.2f}",
                f"{median - plain:+.3f}",
                f"{writing:.3f}",
            ]
        )
    columns = ["", "steps", "seconds", "of the median step", "longer by, s", "written during it, s"]
    return "\n\n".join(["## Steps beside a save", text, table(columns, rows)])


def _starts(ranks: int, results: Results) -> str:
    text = (
        f"On {ranks} ranks, from the process group to the begin of the first step. Verify: SHA-256 of everything, each "
        "rank a part. Residual: reading, decomposing and encoding the pretrained weights; a resumed run compares it "
        "with the digests in the checkpoint. Load: adapters and optimizer. The rest is DeepSpeed's and Lightning's "
        "set-up, and the fingerprint of the weights."
    )
    rows = [_start_row("fresh", results.fresh), _start_row("resumed", results.resumed)]
    fresh, resumed = (min(_slowest(runs)) for runs in (results.fresh, results.resumed))
    columns = ["", "seconds", "verify", "residual", "load", "rest"]
    closing = f"A resumed start takes {resumed / fresh:.2f} of a fresh one (minima)."
    return "\n\n".join(["## Starting", text, table(columns, rows), closing])


def _start_row(label: str, runs: Sequence[Sequence[Start]]) -> list[str]:
    parts = {name: [max(rank.parts[name] for rank in run) for run in runs] for name in ("verify", "residual", "load")}
    rest = [seconds - sum(times) for seconds, *times in zip(_slowest(runs), *parts.values(), strict=True)]
    return [label, *(shown(times) for times in (_slowest(runs), *parts.values(), rest))]


def _slowest(runs: Sequence[Sequence[Start]]) -> list[float]:
    return [max(rank.seconds for rank in run) for run in runs]


if __name__ == "__main__":
    main()
