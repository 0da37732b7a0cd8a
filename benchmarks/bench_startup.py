"""How long commands take before they do anything: imports, ``--help``, ``inspect``, and ``plan`` of a 70B model.

    python benchmarks/bench_startup.py           # benchmarks/results/startup.md
    python benchmarks/bench_startup.py --tiny    # a dry run, once each, without plan

Each in an interpreter of its own, by turns; seconds of the clock, which suffer from whatever else the machine does, and
CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from reporting import RESULTS, ROOT, header, table, verdict, write_report
from safetensors.torch import save_file

CONFIG = "configs/llama3-70b_qpissa_32gpu.yaml"


@dataclass(frozen=True, kw_only=True)
class Start:
    """One way to start."""

    name: str
    arguments: list[str]
    goal: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_file({"layer.weight": torch.ones(4, 3)}, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
        command = ["-m", "lowrank_dist.cli"]
        starts = [
            Start(name="`import lowrank_dist`", arguments=["-c", "import lowrank_dist"], goal=0.2),
            Start(name="`lowrank-dist --help`", arguments=[*command, "--help"], goal=1),
            Start(name="`lowrank-dist inspect`, a small model", arguments=[*command, "inspect", folder], goal=1),
        ]
        if not options.tiny:
            starts += [
                Start(name="`lowrank-dist plan`, LLaMA-3-70B", arguments=[*command, "plan", "--config", CONFIG], goal=5)
            ]
        found: dict[str, list[tuple[float, float]]] = {start.name: [] for start in starts}
        for _ in range(1 if options.tiny else options.rounds):
            for start in starts:
                found[start.name].append(run(start.arguments))
    rows, verdicts = [], []
    for start in starts:
        clock, cpu = zip(*found[start.name], strict=True)
        rows.append([start.name, *(f"{min(times):.2f} / {statistics.median(times):.2f}" for times in (clock, cpu))])
        met = verdict(min(clock) < start.goal)
        verdicts.append(f"- {start.name}: {min(clock):.2f} s, goal {start.goal:g} s: {met}")
    rounds = 1 if options.tiny else options.rounds
    note = (
        "a dry run; " * options.tiny
        + f"least / median of {rounds} rounds, each in a fresh interpreter; files in the page cache"
    )
    parts = [
        header(
            "Start-up",
            "bench_startup.py",
            ["torch", "lightning", "peft", "bitsandbytes"],
            "one process at a time",
            [note],
        ),
        table(["", "seconds", "CPU seconds"], rows),
        "\n".join(verdicts),
    ]
    write_report(options.output, parts, dry=options.tiny)


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds of the clock, and CPU seconds, of ``python arguments``."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


if __name__ == "__main__":
    main()
