"""The settings of a run as ``lowrank-dist fit`` understands them, without running it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser, capture_parser


@cache
def fit_parser() -> ArgumentParser:
    """The parser of LightningCLI as `run_trainer` builds it, before it parses."""
    from lowrank_dist.cli import run_trainer

    arguments, sys.argv = sys.argv, ["lowrank-dist", "fit"]
    try:
        return capture_parser(run_trainer, ["fit"])
    finally:
        sys.argv = arguments


def parse_fit(argv: Sequence[str]) -> Any:
    """Settings of ``lowrank-dist fit argv``: several ``--config`` files, later ones over earlier ones, and any key.

    What cannot be parsed ends the program with the message that ``fit`` gives.
    """
    with warnings.catch_warnings():
        # jsonargparse fills every option of peft's configuration in, and peft warns of this one
        warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
        return fit_parser().parse_args(["fit", *argv]).fit


def instantiated(settings: Any, part: str) -> Any:
    """The object that `part` (``model``, ``data``) of `parse_fit` stands for; for ``trainer``, its options."""
    fit: Any = fit_parser()._subcommands_action.choices["fit"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
        return getattr(fit, "instantiate", fit.instantiate_classes)(settings)[part]
