"""What a training step costs the host, beside PEFT: a model so small that its arithmetic is next to nothing.

    python benchmarks/bench_host.py           # benchmarks/results/host.md
    python benchmarks/bench_host.py --tiny    # a dry run of two layers
    python benchmarks/bench_host.py --compiled    # also with compiled layers

CPU seconds of a step (``time.process_time``), each way in processes of its own, all ways by turns. On a device the
host's work is hidden behind the arithmetic, as long as it takes less time. Seconds of the thread that trains are told
apart: gloo moves data, and asks for them, in threads of its own, which a device does not have.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import run_ranks
from reporting import table, verdict
from steps import (
    DENSE,
    OURS,
    PEER,
    TWO,
    Measured,
    RunSpec,
    Train,
    Way,
    by_turns,
    parser,
    report,
    train_ours,
    trainers,
    ways,
)
from transformers import LlamaConfig

WAYS: dict[str, Way] = ways("never") | {"ours, folded": (1, partial(train_ours, fold="always"))}
COMPILED: dict[str, Way] = {
    f"{name}, compiled": (ranks, partial(train_ours, fold="never", compile_layers="inductor"))
    for name, ranks in ((OURS, 1), (TWO, 2))
}
GOAL = 0.8  # of PEFT over bitsandbytes


def main() -> None:
    known = parser(__doc__, "host.md", tiny="of two layers", steps="timed steps of a round", n_steps=30, n_rounds=3)
    known.add_argument("--compiled", action="store_true", help="also with compiled layers, which needs a compiler")
    options = known.options()
    compared = WAYS | (COMPILED if options.compiled else {})
    with tempfile.TemporaryDirectory() as folder:
        layers = 2 if options.tiny else 16
        job = small_model(Path(folder), layers, options.steps)
        found: dict[str, list[float]] = {way: [] for way in compared}
        alone: dict[str, list[float]] = {way: [] for way in compared}  # of the training thread
        collectives: dict[str, dict[str, tuple[int, int]]] = {}
        for way, ranks, train in by_turns(compared, options.rounds):
            measured = run_ranks(ranks, _run, train, job, group=ranks > 1)
            found[way].append(max(statistics.median(rank.seconds) for rank, _, _ in measured))
            alone[way].append(max(of_thread for _, of_thread, _ in measured))
            collectives[way] = measured[0][2]
    notes = [
        said_of(job, options, f"{layers}"),
        "ours: NF4 with double quantization under `PiSSAStrategy`, from a batch's start to its end in Lightning's "
        "loop; PEFT: forward, backward and step without a Trainer",
    ]
    parts = [_table(found, alone, layers), _collectives(collectives[TWO], layers), _verdicts(found)]
    report(options, "CPU time of a training step", "bench_host.py", notes, parts)


def small_model(folder: Path, layers: int, steps: int) -> RunSpec:
    """A job on a model so small that its arithmetic is next to nothing, saved in `folder`."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=256,
    )
    return RunSpec(
        name="host",
        checkpoint=trainers.save_model(folder / "model", config, "cpu"),
        tokens=16,
        sequences=2,
        rank=8,
        steps=steps,
        device="cpu",
        clock=time.process_time,
    )


def said_of(job: RunSpec, options: argparse.Namespace, layers: str) -> str:
    """What a report says of `small_model`."""
    return (
        f"a LLaMA of {layers} layers of width 64, adapters on all linears (r = {job.rank}), gradient checkpointing, "
        f"batches of {job.sequences} x {job.tokens} tokens, AdamW, fp32; medians of {options.steps} steps, "
        f"{options.rounds} rounds by turns"
    )


def _run(train: Train, job: RunSpec) -> tuple[Measured, float, dict[str, tuple[int, int]]]:
    """A way's steps; seconds of the training thread in a timed step; what the last timed step called.

    That is by collective, how often it was called, and bytes that it brought together.
    """
    calls: list[tuple[str, int]] = []
    marks: list[tuple[float, int]] = []  # seconds of this thread, and calls, whenever the clock was read around a step
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(dist, name, _counted(name, getattr(dist, name), calls))

    def clock() -> float:
        marks.append((time.thread_time(), len(calls)))
        return job.clock()

    measured = train(replace(job, clock=clock))
    found: dict[str, tuple[int, int]] = {}
    for name, nbytes in calls[marks[-2][1] : marks[-1][1]]:
        before = found.get(name, (0, 0))
        found[name] = before[0] + 1, before[1] + nbytes
    timed = [seconds for seconds, _ in marks[-2 * job.steps :]]
    of_thread = statistics.median(end - begin for begin, end in zip(timed[::2], timed[1::2], strict=True))
    return measured, of_thread, found


def _counted(name: str, collective: Callable[..., Any], calls: list[tuple[str, int]]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        tensors = [value for value in (*args, *options.values()) if hasattr(value, "nbytes")]
        calls.append((name, max(tensor.nbytes for tensor in tensors)))
        return collective(*args, **options)

    return called


def _table(found: dict[str, list[float]], alone: dict[str, list[float]], layers: int) -> str:
    rows = [
        [
            way,
            f"{1e3 * min(times):.1f} / {1e3 * statistics.median(times):.1f}",
            f"{1e3 * min(alone[way]):.1f}",
            f"{1e6 * min(times) / layers:.0f}",
            f"{min(times) / min(found[PEER]):.2f}",
            f"{min(times) / min(found[DENSE]):.2f}",
        ]
        for way, times in found.items()
    ]
    columns = [
        "",
        "ms a step, least / median round",
        "of the training thread, least",
        "us a layer",
        f"of {PEER}",
        f"of {DENSE}",
    ]
    return table(columns, rows)


def _collectives(of_step: dict[str, tuple[int, int]], layers: int) -> str:
    rows = [[name, calls, f"{calls / layers:.2f}", f"{nbytes / 1e3:.1f}"] for name, (calls, nbytes) in of_step.items()]
    return "Collectives of ours on 2 ranks:\n\n" + table(["", "a step", "a layer", "KB a step"], rows)


def _verdicts(found: dict[str, list[float]]) -> str:
    lines = [
        f"- {way}: {min(found[way]) / min(found[PEER]):.2f} of {PEER}, goal {GOAL}: "
        f"{verdict(min(found[way]) <= GOAL * min(found[PEER]))}"
        for way in found
        if way.startswith(OURS)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
