"""``lowrank-dist merge``: merge an adapter into the original model, written as an ordinary Hugging Face model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lowrank_dist.cli.output import add_overwrite
from lowrank_dist.errors import InputError
from lowrank_dist.storage.dtypes import NAMED_DTYPES


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist merge``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    if not 0 < options.max_shard_size < float("inf"):
        raise InputError(f"--max-shard-size {options.max_shard_size} must be a positive number of GB")
    from lowrank_dist.export.merge import merge_checkpoint  # takes seconds to import

    output = merge_checkpoint(
        options.checkpoint,
        options.output,
        base=options.base,
        revision=options.revision,
        dtype=None if options.dtype is None else NAMED_DTYPES[options.dtype],
        max_file_bytes=int(options.max_shard_size * 1e9),
        overwrite=options.overwrite,
        show_progress=True,
    )
    print(output)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist merge``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist merge",
        description="Write the original model with an adapter merged into it, as an ordinary Hugging Face model. "
        "It works by blocks of rows or by modules, so that memory does not grow with the model.",
    )
    parser.add_argument("checkpoint", help="directory that AdapterCheckpoint, convert or PEFT wrote")
    parser.add_argument("--output", required=True, help="directory to write; complete or absent")
    add_overwrite(parser)
    parser.add_argument(
        "--base", help="directory or hub id of the original model (default: the one recorded in the checkpoint)"
    )
    parser.add_argument("--revision", help="revision of a hub id (default: the recorded commit)")
    parser.add_argument("--dtype", choices=list(NAMED_DTYPES), help="dtype of the output (default: that of the base)")
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of one file (default: %(default)s)",
    )
    return parser
