"""``lowrank-dist import``: write weights in ``pytorch_model.bin`` and the like as safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lowrank_dist.errors import InputError


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist import``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    if not 0 < options.max_shard_size < float("inf"):
        raise InputError(f"--max-shard-size {options.max_shard_size} must be a positive number of GB")
    from lowrank_dist.export.import_pickled import import_checkpoint  # takes seconds to import

    output = import_checkpoint(
        options.source, options.output, max_file_bytes=int(options.max_shard_size * 1e9), show_progress=True
    )
    print(output)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist import``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist import",
        description="Write the weights of pytorch_model.bin, or of other files that torch.save wrote, as safetensors; "
        "an adapter in adapter_model.bin with its configuration. They are read by torch.load(weights_only=True), which "
        "runs no code of the file.",
    )
    parser.add_argument("source", help="directory of the model or of the adapter, or one file of weights")
    parser.add_argument("--output", required=True, help="directory to write; complete or absent")
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of one file (default: %(default)s)",
    )
    return parser
