"""The files that a command writes: the option that says what may be replaced, and checks before any work."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowrank_dist.errors import InputError
from lowrank_dist.storage.replacing import check_file


def add_overwrite(parser: ArgumentParser) -> None:
    """Add ``--overwrite``."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is at --output: a file, or a directory of the same kind that this program wrote",
    )


def check_outputs(files: Mapping[str, str | None], *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that the files of a command can be written. Nothing is left of the check.

    Parameters
    ----------
    files
        The files by option; None where the option was not given.
    overwrite
        Whether they may replace files.
    inputs
        Files that the command reads.

    Raises
    ------
    InputError
        If one may not be replaced, cannot be written, is one of the inputs, or is named twice; or if `overwrite` has
        nothing to replace.
    """
    given = {option: Path(file) for option, file in files.items() if file is not None}
    if overwrite and not given:
        raise InputError(f"--overwrite has no effect without {' or '.join(files)}; leave it out")
    seen = {file.resolve(): "what the command reads" for file in inputs}
    for option, file in given.items():
        if (other := seen.setdefault(file.resolve(), option)) != option:
            raise InputError(f"{option} {file} is {other} too; choose another path")
        check_file(file, overwrite=overwrite)
