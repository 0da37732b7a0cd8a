"""``lowrank-dist compare``: print a table of runs that differ in their settings; write or draw it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lowrank_dist.cli.compare.groups import RATE, as_dict, compare
from lowrank_dist.cli.compare.runs import find_runs
from lowrank_dist.cli.compare.table import as_table, panels
from lowrank_dist.cli.output import check_outputs
from lowrank_dist.cli.report_figure import figure_of
from lowrank_dist.storage.atomic import atomic_file
from lowrank_dist.storage.writer import write_report


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist compare``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    check_outputs({"--json": options.json, "--picture": options.picture}, overwrite=options.overwrite)
    found = compare(find_runs([Path(path) for path in options.runs]), rate=options.choose)
    print(as_table(found))
    if options.json is not None:
        write_report(Path(options.json), as_dict(found), overwrite=options.overwrite)
    if options.picture is not None:
        figure = figure_of(panels(found))
        with atomic_file(Path(options.picture), overwrite=options.overwrite) as fresh:
            figure.savefig(fresh, dpi=120, format="png")
        print(options.picture)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist compare``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist compare",
        description="Compare runs at equal steps, at equal time, and each method at its best learning rate. Runs are "
        "directories with the config.yaml that `lowrank-dist fit` writes, such as the points of `submit --sweep`. What "
        "differs in their configurations tells methods apart; runs that differ only in the seed are averaged.",
    )
    parser.add_argument("runs", nargs="+", metavar="DIRECTORY", help="a run, or a directory with runs below it")
    parser.add_argument(
        "--choose",
        default=RATE,
        metavar="KEY",
        help="setting of which every method gets its best value (default: %(default)s)",
    )
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--picture", help="PNG to draw: losses by step, by seconds and by the chosen setting")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --json and --picture")
    return parser
