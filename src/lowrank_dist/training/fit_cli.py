"""``lowrank-dist fit | validate | test``: LightningCLI with the module and the data module of this package.

Also what a run would be, without running it: its settings, checked as LightningCLI checks them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser, capture_parser

TRAINER_COMMANDS = {
    "fit": "train adapters as a YAML file says (LightningCLI)",
    "validate": "evaluate on the validation data (LightningCLI)",
    "test": "evaluate on the test data (LightningCLI)",
}


def run_trainer(argv: Sequence[str]) -> int:
    """Run a Trainer command of LightningCLI with `CausalLMModule` and `SFTDataModule`; returns 0."""
    from lightning.pytorch.cli import LightningCLI

    from lowrank_dist.data.datamodule import SFTDataModule
    from lowrank_dist.training.module import CausalLMModule

    class Cli(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            skipped = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            return dict.fromkeys(TRAINER_COMMANDS, skipped)

    Cli(
        CausalLMModule,
        SFTDataModule,
        # LightningCLI warns of arguments given to it beside a command line, even of the same ones
        args=None if list(argv) == sys.argv[1:] else list(argv),
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lowrank-dist"},
    )
    return 0


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Inside, ``lowrank-dist argv`` is what this process was started with."""
    before, sys.argv = sys.argv, ["lowrank-dist", *argv]
    try:
        yield
    finally:
        sys.argv = before


@cache
def fit_parser() -> ArgumentParser:
    """The parser of LightningCLI as `run_trainer` builds it, before it parses."""
    with command_line(["fit"]):
        return capture_parser(run_trainer, ["fit"])


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
