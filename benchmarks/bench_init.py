"""Time, accuracy, memory and traffic of the initialisation, beside PEFT, dask and Heat: a Markdown report.

    python benchmarks/bench_init.py                              # all tables: benchmarks/results/init.md
    python benchmarks/bench_init.py --table peft --table layers  # some of them
    python benchmarks/bench_init.py --tiny                       # a dry run on random matrices of a few rows

Every peer runs in processes of its own, in the same run; times leave out the start of the interpreter and imports.
Peers that are not installed (benchmarks/requirements.txt) are named as skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import models
from bench import Bench, Settings
from projection import projection
from ranks import preload
from reporting import ROOT, header, write_report
from tables import layers, limit, peft, reduction, svd

from lowrank_dist.demo.assets import fetch_model

TABLES = {
    "peft": ("Initialisation of a model", peft),
    "svd": ("Distributed SVD", svd),
    "layers": ("Layers of large models", layers),
    "limit": ("Distance to the limit", limit),
    "reduction": ("Reduction of the quantization error", reduction),
    "projection": ("Projection", projection),
}
PACKAGES = ("torch", "numpy", "peft", "transformers", "bitsandbytes", "dask", "heat", "mpi4py")


def main() -> None:
    options = _options()
    preload("projection", "tables")
    chosen = list(dict.fromkeys(options.table or TABLES))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(_settings(options, Path(scratch)))
        parts = [_header(bench.settings)]
        for name in chosen:
            title, make = TABLES[name]
            print(f"{name}: {title}", file=sys.stderr, flush=True)
            parts.append(f"## {title} (`{name}`)\n\n{make(bench)}")
            write_report(options.output, parts, dry=options.tiny)  # what is complete stays if the rest is interrupted
    print("\n\n".join(parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", choices=list(TABLES), help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "init.md")
    parser.add_argument("--tiny", action="store_true", help="dry run on random matrices of a few rows")
    parser.add_argument(
        "--large", action="store_true", help="a layer of LLaMA-3-70B too: 12 GB of memory, 5 GB of disk"
    )
    parser.add_argument("--model", type=Path, help="directory of a checkpoint (default: SmolLM2-135M, fetched)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where it is fetched to")
    parser.add_argument("--scratch", type=Path, help="where synthetic matrices are written (default: the system's)")
    parser.add_argument("--rank", type=int, default=64, help="r of the model's tables")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the work")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, at most")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the repeats of one measurement")
    return parser.parse_args()


def _settings(options: argparse.Namespace, scratch: Path) -> Settings:
    common = {"scratch": scratch, "ranks": options.ranks, "tiny": options.tiny}
    if options.tiny:
        model = models.save_tiny_model(scratch / "random-llama")
        return Settings(model=model, rank=8, layer_rank=8, repeats=1, **common)
    model = options.model or fetch_model(options.cache)
    return Settings(
        model=model,
        rank=options.rank,
        repeats=options.repeats,
        budget=options.budget,
        large=options.large,
        **common,
    )


def _header(settings: Settings) -> str:
    notes = [
        f"up to {settings.repeats} repeats after a warm-up, which is the only measurement where it took more than "
        f"{settings.budget:g} s; all files in the page cache"
    ]
    if settings.tiny:
        notes.append("a dry run on random matrices of a few rows: its figures mean nothing")
    machine = f"{settings.ranks} ranks of one thread and core, peers the same number of threads"
    return header("Initialisation: measured", "bench_init.py", PACKAGES, machine, notes)


if __name__ == "__main__":
    main()
