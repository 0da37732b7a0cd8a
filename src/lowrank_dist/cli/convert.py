"""``lowrank-dist convert``: a checkpoint in, a LoRA for the original model out."""

from __future__ import annotations

import argparse

import torch

from lowrank_dist.convert import SERVED_RANKS, Conversion, convert_checkpoint
from lowrank_dist.truncate import EnergyKept


def run(options: argparse.Namespace) -> int:
    """Run ``lowrank-dist convert``. Returns the exit status."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    done = convert_checkpoint(options.checkpoint, options.output, rank=options.rank, dtype=dtype, progress=True)
    print(done.path)
    if done.energy is not None:
        print(f"Rank {done.rank} of {done.exact_rank} {_kept(done.energy)}.")
    for line in advice(done):
        print(line)
    return 0


def advice(done: Conversion) -> list[str]:
    """What servers would make of the LoRA, where they would not take it as it is, and the ranks to choose instead."""
    lines = []
    if not done.uniform:
        lines.append(
            f"Ranks (up to {done.rank}) or scalings differ between modules; servers such as vLLM take one of each for "
            "all modules, which --rank gives."
        )
    elif done.rank not in SERVED_RANKS:
        larger = [rank for rank in SERVED_RANKS if rank > done.rank]
        serves = f"rank {done.rank} needs {larger[0]}" if larger else f"rank {done.rank} is beyond them"
        lines.append(f"vLLM's --max-lora-rank is one of {', '.join(map(str, SERVED_RANKS))}: {serves}.")
    return lines + [f"--rank {rank} {_kept(energy)}." for rank, energy in done.alternatives.items()]


def _kept(energy: EnergyKept) -> str:
    if energy.least > 1 - 1e-9:
        return "keeps all of the update's energy"
    return f"keeps {energy.overall:.4%} of the update's energy, at least {energy.least:.4%} ({energy.least_of})"
