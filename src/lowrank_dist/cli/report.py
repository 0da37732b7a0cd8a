"""``lowrank-dist report``: print the report of an initialisation; write it as JSON or a page, or draw it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.cli.output import check_outputs
from lowrank_dist.cli.report_figure import figure_of, panels
from lowrank_dist.cli.report_page import HISTORY, METRICS, find, page
from lowrank_dist.decomposition.report import MatrixReport, as_table, ranks_as_table
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.storage.atomic import atomic_file
from lowrank_dist.storage.layout import MANIFEST, checked_manifest
from lowrank_dist.storage.parse import MAX_MANIFEST, Record, read_record
from lowrank_dist.storage.writer import write_report


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist report``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    source = Path(options.directory)
    given = {"history": (options.history, HISTORY), "metrics": (options.metrics, METRICS)}
    _check_used(options, given)
    records = {name: Path(path) if path else find(source, default) for name, (path, default) in given.items()}
    check_outputs(
        {"--json": options.json, "--picture": options.picture, "--html": options.html},
        overwrite=options.overwrite,
        inputs=[manifest_file(source), *filter(None, records.values())],
    )
    manifest = read_manifest_of(source)
    matrices, rank_by_layer = report_of(manifest)
    tables = [as_table(matrices)] if matrices else []
    if rank_by_layer:
        tables.append(f"Ranks that the adapter keeps:\n{ranks_as_table(rank_by_layer)}")
    print("\n\n".join(tables))
    if options.json is not None:
        figures: dict[str, Any] = {"matrices": [matrix.as_dict() for matrix in matrices]}
        figures |= {"rank_by_layer": rank_by_layer} if rank_by_layer else {}
        write_report(Path(options.json), figures, overwrite=options.overwrite)
    if options.picture is not None:
        figure = figure_of(panels(matrices, rank_by_layer))
        with atomic_file(Path(options.picture), overwrite=options.overwrite) as fresh:
            figure.savefig(fresh, dpi=120, format="png")
        print(options.picture)
    if options.html is not None:
        text = page(source, manifest, matrices, rank_by_layer, **records)
        with atomic_file(Path(options.html), overwrite=options.overwrite) as fresh:
            fresh.write_text(text, encoding="utf-8")
        used = [str(path) for path in records.values() if path is not None]
        print(f"{options.html}{', with ' + ' and '.join(used) if used else ''}")
    return 0


def _check_used(options: argparse.Namespace, records: Mapping[str, Any]) -> None:
    """Raise InputError for records without a page to show them."""
    name = next((name for name in records if getattr(options, name) is not None), None)
    if options.html is None and name is not None:
        raise InputError(f"--{name} {getattr(options, name)} has no effect without --html; leave it out")


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist report``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist report",
        description="Print a table, by layer type, of what an initialisation measured, and of the ranks of AdaLoRA.",
    )
    parser.add_argument("directory", help="residual model, checkpoint of AdapterCheckpoint, or JSON of InitReport")
    parser.add_argument("--json", help="file to write the figures of every matrix to")
    parser.add_argument("--picture", help="PNG to draw: heat maps layer x type, spectra")
    parser.add_argument("--html", help="page to write, complete in one file: figures, curves of the run, settings")
    parser.add_argument(
        "--history",
        help=f"with --html: JSON of LossHistory (default: a {HISTORY} in the directory, or up to two above it)",
    )
    parser.add_argument("--metrics", help=f"with --html: CSV of the run's CSVLogger (default: a {METRICS}, likewise)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --json, --picture and --html")
    return parser


def manifest_file(path: Path) -> Path:
    """The file with the report: `path`, or the manifest in it."""
    return path / MANIFEST if path.is_dir() else path


def read_manifest_of(path: Path) -> Record:
    """The report stored in a residual model, in a checkpoint, or in a JSON file that `InitReport` wrote."""
    file = manifest_file(path)
    if not file.exists():
        raise CheckpointError(
            f"{path}: holds no {MANIFEST}; pass a residual model, a directory that AdapterCheckpoint wrote, or the "
            "JSON of InitReport"
        )
    manifest = checked_manifest(read_record(file, MAX_MANIFEST))
    if "matrices" not in manifest:
        raise CheckpointError(f"{file}: not a report: it has no entry 'matrices'")
    if not manifest["matrices"] and not manifest.get("rank_by_layer"):
        raise CheckpointError(
            f"{file}: the run decomposed no matrix and stored none in a residual format, so that there is nothing to "
            "report"
        )
    return manifest


def report_of(manifest: Record) -> tuple[list[MatrixReport], dict[str, int]]:
    """The measures of every matrix, and the ranks that the adapter of a checkpoint keeps by layer, if they change."""
    entries, rank_by_layer = manifest.records("matrices"), dict[str, int](manifest.record("rank_by_layer"))
    return [MatrixReport.from_dict(entry) for entry in entries], rank_by_layer
