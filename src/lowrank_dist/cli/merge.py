"""``lowrank-dist merge``: a checkpoint in, an ordinary Hugging Face model out."""

from __future__ import annotations

import argparse

import torch

from lowrank_dist.errors import InputError
from lowrank_dist.export.merge import merge_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(options: argparse.Namespace) -> int:
    """Run ``lowrank-dist merge``. Returns the exit status."""
    if not 0 < options.max_shard_size < float("inf"):
        raise InputError(f"--max-shard-size {options.max_shard_size} must be a positive number of GB")
    output = merge_checkpoint(
        options.checkpoint,
        options.output,
        base=options.base,
        revision=options.revision,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        max_file_bytes=int(options.max_shard_size * 1e9),
        overwrite=options.overwrite,
        show_progress=True,
    )
    print(output)
    return 0
