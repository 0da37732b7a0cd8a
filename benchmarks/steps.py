"""What the benchmarks of a training step share: the ways that are compared, options, rounds by turns, the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from reporting import ROOT, header, write_report

sys.path.insert(0, str(ROOT))  # for benchmarks.gpu

from benchmarks.gpu import trainers  # noqa: F401
from benchmarks.gpu.trainers import Measured, RunSpec, train_bitsandbytes, train_dense, train_ours
from ranks import preload

from lowrank_dist.layers.adapted import FoldAdapters

PACKAGES = ("torch", "lightning", "deepspeed", "peft", "transformers", "bitsandbytes")
DENSE, PEER, OURS, TWO = "PEFT, dense", "PEFT + bitsandbytes", "ours", "ours, 2 ranks"

#: What trains a model, and the number of ranks for it.
Train = Callable[[RunSpec], Measured]
Way = tuple[int, Train]


def ways(fold: FoldAdapters) -> dict[str, Way]:
    """The peers, and ours on one rank and on two."""
    ours = partial(train_ours, fold=fold)
    return {DENSE: (1, train_dense), PEER: (1, train_bitsandbytes), OURS: (1, ours), TWO: (2, ours)}


def parser(description: str | None, results: str, *, tiny: str, steps: str, n_steps: int, n_rounds: int) -> Parser:
    """Options of all such benchmarks: where the report goes, a dry run, and how much is measured.

    Parameters
    ----------
    description
        Of the script.
    results
        Name of the report in ``benchmarks/results``.
    tiny, steps
        What is said of ``--tiny`` and ``--steps``.
    n_steps, n_rounds
        Defaults.
    """
    found = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / results)
    found.add_argument("--tiny", action="store_true", help=f"dry run {tiny}")
    found.add_argument("--steps", type=int, default=n_steps, help=steps)
    found.add_argument("--rounds", type=int, default=n_rounds)
    return found


class Parser(argparse.ArgumentParser):
    """A parser whose ``--tiny`` measures next to nothing."""

    def options(self) -> argparse.Namespace:
        options = self.parse_args()
        if options.tiny:
            options.steps, options.rounds = 2, 1
        preload("benchmarks.gpu.trainers")
        return options


def by_turns(compared: dict[str, Way], rounds: int) -> Iterator[tuple[str, int, Train]]:
    """All ways, `rounds` times."""
    for _ in range(rounds):
        for name, (ranks, train) in compared.items():
            print(f"  {name} ...", file=sys.stderr, flush=True)
            yield name, ranks, train


def report(options: argparse.Namespace, title: str, script: str, notes: list[str], parts: list[str]) -> None:
    """Write the report, and print it."""
    if options.tiny:
        notes = [*notes, "a dry run: its figures mean nothing"]
    parts = [header(title, script, PACKAGES, "ranks of one thread", notes), *parts]
    write_report(options.output, parts, dry=options.tiny)
    print("\n\n".join(parts))
