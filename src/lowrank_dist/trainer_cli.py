"""``lowrank-dist fit | validate | test``: LightningCLI with the module and the data module of this package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TRAINER_COMMANDS = {
    "fit": "train adapters as a YAML file says (LightningCLI)",
    "validate": "evaluate on the validation data (LightningCLI)",
    "test": "evaluate on the test data (LightningCLI)",
}


def run_trainer(argv: Sequence[str]) -> int:
    """Run a Trainer command of LightningCLI with `CausalLMModule` and `SFTDataModule`; returns 0."""
    from lightning.pytorch.cli import LightningCLI

    from lowrank_dist.data import SFTDataModule
    from lowrank_dist.module import CausalLMModule

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


def fit_settings(config: str, overrides: Sequence[str]) -> Any:
    """Every setting of ``lowrank-dist fit --config CONFIG OVERRIDES``, checked as that checks it; nothing is built.

    Raises
    ------
    SystemExit
        With status 2, after a message of the parser, where a key is unknown or a value is of the wrong type.
    """
    from jsonargparse import capture_parser

    with command_line(["fit"]):
        parser = capture_parser(run_trainer, ["fit"])
    return parser.parse_args(["fit", f"--config={config}", *overrides]).fit
