"""Runs the tables that need an accelerator and writes them as Markdown, with versions and commit.

python -m benchmarks.gpu --all                      # benchmarks/results/gpu.md
python -m benchmarks.gpu --all --device cpu --tiny  # a dry run
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.gpu.initialisation import initialisation_table, models
from benchmarks.gpu.layers import layers_table, scale
from benchmarks.gpu.step import cases, step_table
from benchmarks.gpu.trainers import SHORT
from benchmarks.gpu.whole import STAGES, whole, whole_table
from reporting import ROOT, header, write_report

PACKAGES = ("torch", "triton", "deepspeed", "bitsandbytes", "peft", "transformers", "liger-kernel")
TABLES = ("layers", "step", "initialisation", "whole")


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dry = options.tiny or device.type != "cuda"
    notes = ["a dry run at a tiny scale or without an accelerator: its figures mean nothing"] if dry else []
    title = "On an accelerator: " + ("a dry run" if dry else "measured")
    parts = [header(title, "gpu", PACKAGES, machine, notes)]
    if options.all or "layers" in options.table:
        parts.append(layers_table(scale(tiny=options.tiny), device, dtype))
    if options.all or "step" in options.table:
        of_step = cases(tiny=options.tiny)[: 1 if options.first_model else None]
        of_step = [replace(case, steps=options.steps or case.steps) for case in of_step]
        parts.append(step_table(of_step, device, [SHORT[way] for way in options.way or SHORT]))
    if options.all or "initialisation" in options.table:
        parts.append(initialisation_table(models(tiny=options.tiny), device))
    if options.all or "whole" in options.table:
        of = {name: getattr(options, name) for name in ("layers", "rounds", "steps", "skip")}
        parts.append(whole_table(whole(tiny=options.tiny, weights_only=options.weights_only, **of), device))
    write_report(options.output, parts, dry=dry)
    print("\n\n".join(parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every table")
    parser.add_argument("--table", choices=TABLES, action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="dry run at a tiny scale")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    parser.add_argument("--steps", type=int, help="of `step` and `whole`: timed steps")
    of_step = parser.add_argument_group("of the table `step`")
    of_step.add_argument("--way", choices=list(SHORT), action="append", help="only this one; may be repeated")
    of_step.add_argument("--first-model", action="store_true", help="LLaMA-3-8B only")
    of_whole = parser.add_argument_group("of the table `whole`")
    of_whole.add_argument("--layers", type=int, help="run so many of the decoder layers (default: all)")
    of_whole.add_argument(
        "--rounds", type=int, action="append", default=[], help="T; may be repeated (default: 1 and 5)"
    )
    of_whole.add_argument("--skip", choices=STAGES, action="append", default=[], help="leave a stage out")
    of_whole.add_argument("--weights-only", action="store_true", help="save adapters without the state of training")
    options = parser.parse_args()
    if not options.all and not options.table:
        parser.error("give --all or --table")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --device cpu --tiny is a dry run")
    return options


if __name__ == "__main__":
    main()
