"""``lowrank-dist convert``: convert a checkpoint's adapter to a LoRA for the original model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from lowrank_dist.cli.output import add_overwrite
from lowrank_dist.errors import InputError
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.serving import objections
from lowrank_dist.linalg.truncate import EnergyKept
from lowrank_dist.storage.dtypes import NAMED_DTYPES
from lowrank_dist.storage.layout import MANIFEST


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist convert``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    dtype = None if options.dtype is None else NAMED_DTYPES[options.dtype]
    if options.base is not None:
        return _refit(options, dtype, argv)
    if options.devices != 1:
        raise InputError(f"--devices {options.devices}: ranks share a fit only; leave it out, or pass --base too")
    done = convert_checkpoint(
        options.checkpoint,
        options.output,
        rank=options.rank,
        dtype=dtype,
        pretrained=options.pretrained,
        revision=options.revision,
        overwrite=options.overwrite,
        progress=True,
    )
    print(done.path)
    if done.energy is not None:
        print(f"Rank {done.rank} of {done.exact_rank} {_kept(done.energy)}.")
    for line in objections(done.path):
        print(line)
    for rank, energy in done.alternatives.items():
        print(f"--rank {rank} {_kept(energy)}.")
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist convert``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist convert",
        description="Convert a checkpoint's adapter to a LoRA for the original model: the exact one, [A; A_0], "
        "[B | -B_0] of rank 2r, or the nearest one of a lower rank. Stock PEFT loads it. Adapters that are no LoRA "
        "(VeRA, DoRA, ...) have a nearest one only.",
    )
    parser.add_argument("checkpoint", help="directory that AdapterCheckpoint wrote")
    parser.add_argument("--output", required=True, help="directory to write; complete or absent")
    add_overwrite(parser)
    parser.add_argument(
        "--rank", type=int, help="rank of the nearest LoRA, by singular values (default: exact, rank 2r)"
    )
    parser.add_argument(
        "--dtype",
        choices=list(NAMED_DTYPES),
        help="dtype of the written factors (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--base",
        choices=["original", "nf4"],
        help="with --rank: fit the LoRA to the trained model, quantization included, on this base: the original model, "
        "or the original model loaded in NF4 by transformers",
    )
    parser.add_argument(
        "--pretrained",
        help="with --base, and for adapters that are no LoRA: directory or hub id of the original model (default: the "
        "one recorded in the checkpoint)",
    )
    parser.add_argument("--revision", help="revision of a hub id (default: the recorded commit)")
    parser.add_argument("--devices", type=int, default=1, help="with --base: ranks to start on this host")
    return parser


def _refit(options: argparse.Namespace, dtype: torch.dtype | None, argv: Sequence[str]) -> int:
    """Run ``lowrank-dist convert --base``; `options` were parsed from `argv`."""
    # imported here because exact and truncated conversions do not need them
    from lowrank_dist.cli.ranks import launch, launched, shard_group
    from lowrank_dist.export.refit import refit_checkpoint

    if options.rank is None:
        raise InputError("--base fits a LoRA of a chosen rank: pass --rank too")
    if options.devices < 1:
        raise InputError(f"--devices {options.devices} must be at least 1")
    if options.devices > 1 and not launched():
        return launch(["convert", *argv], options.devices)
    with shard_group("auto") as (group, device):
        done = refit_checkpoint(
            options.checkpoint,
            options.output,
            rank=options.rank,
            base=options.base,
            group=group,
            device=device,
            dtype=dtype,
            pretrained=options.pretrained,
            revision=options.revision,
            overwrite=options.overwrite,
            show_progress=True,
        )
        if group.rank == 0:
            print(done.path)
            print(
                f"The exact LoRA misses {done.before:.4%} of the difference between the trained model and the "
                f"{options.base} base (Frobenius); this LoRA of rank {done.rank} misses {done.after:.4%}."
            )
            for line in objections(done.path):
                print(line)
            if done.not_quantized:
                names = ", ".join(f'"{name}"' for name in done.not_quantized[:3])
                more = f" and {len(done.not_quantized) - 3} more: not_quantized in {MANIFEST}"
                print(
                    "Keep the linear layers dense that were dense in training: BitsAndBytesConfig("
                    f"llm_int8_skip_modules=[{names}]){more if len(done.not_quantized) > 3 else ''}"
                )
    return 0


def _kept(energy: EnergyKept) -> str:
    if energy.least > 1 - 1e-9:
        return "keeps all of the update's energy"
    return f"keeps {energy.overall:.4%} of the update's energy, at least {energy.least:.4%} ({energy.least_of})"
