"""``lowrank-dist fit | validate | test``: LightningCLI with the module and the data module of this package.

It also parses and checks the settings of a run, with LightningCLI's own parser, without running it.
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
    "fit": "train adapters as configured in a YAML file (LightningCLI)",
    "validate": "evaluate on the validation data (LightningCLI)",
    "test": "evaluate on the test data (LightningCLI)",
}


def run_trainer(argv: Sequence[str]) -> int:
    """Run a Trainer command of LightningCLI with `CausalLMModule` and `SFTDataModule`; return 0."""
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
        # LightningCLI warns about `args` beside a command line, even if both are the same
        args=None if list(argv) == sys.argv[1:] else list(argv),
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lowrank-dist"},
    )
    return 0


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Inside, ``sys.argv`` is that of ``lowrank-dist argv``."""
    before, sys.argv = sys.argv, ["lowrank-dist", *argv]
    try:
        yield
    finally:
        sys.argv = before


@cache
def fit_parser() -> ArgumentParser:
    """The parser that LightningCLI builds in `run_trainer`."""
    with command_line(["fit"]):
        return capture_parser(run_trainer, ["fit"])


def parse_fit(argv: Sequence[str]) -> Any:
    """Settings of ``lowrank-dist fit argv``. Later ``--config`` files and keys override earlier ones.

    Raises
    ------
    SystemExit
        With the message of ``fit``, if the arguments cannot be parsed.
    """
    with warnings.catch_warnings():
        # jsonargparse sets every option of peft's configuration, and peft warns about this one
        warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
        return fit_parser().parse_args(["fit", *argv]).fit


def instantiated(settings: Any, part: str) -> Any:
    """Instantiate `part` (``model``, ``data``) of the settings from `parse_fit`; for ``trainer`` return its options."""
    fit: Any = fit_parser()._subcommands_action.choices["fit"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
        return getattr(fit, "instantiate", fit.instantiate_classes)(settings)[part]
