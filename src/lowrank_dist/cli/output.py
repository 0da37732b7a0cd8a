"""The option of every command that says what may be replaced."""

from __future__ import annotations

from argparse import ArgumentParser


def add_overwrite(parser: ArgumentParser) -> None:
    """Add ``--overwrite``."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is at --output: a file, or a directory of the same kind that this program wrote",
    )
