"""``lowrank-dist fit | validate | test``: LightningCLI with the module and the data module of this package.

It also parses and checks the settings of a run, with LightningCLI's own parser, without running it.
"""

from __future__ import annotations

import gc
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, capture_parser

TRAINER_COMMANDS = {
    "fit": "train adapters as configured in a YAML file (LightningCLI)",
    "validate": "evaluate on the validation data (LightningCLI)",
    "test": "evaluate on the test data (LightningCLI)",
}


def run_trainer(argv: Sequence[str]) -> int:
    """Run a Trainer command of LightningCLI with a module and `SFTDataModule`; return 0.

    The module is `CausalLMModule`, or the one that ``model.class_path`` names.
    """
    with no_garbage():
        import lightning
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

        from lowrank_dist.data.datamodule import SFTDataModule
        from lowrank_dist.training.module import CausalLMModule
        from lowrank_dist.training.run_records import RunRecords, beside_the_fit, keep_metrics

    class Cli(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            skipped = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            return dict.fromkeys(TRAINER_COMMANDS, skipped)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            if named:  # a part of a configuration that names no class
                parser.set_defaults({"model": {"class_path": "lowrank_dist.CausalLMModule"}})

        def before_instantiate_classes(self) -> None:
            if self.subcommand != "fit":
                loggers = self.config[self.subcommand].trainer.logger
                for logger in loggers if isinstance(loggers, list) else [loggers]:
                    if hasattr(logger, "class_path"):
                        beside_the_fit(logger, str(self.subcommand))

        def before_fit(self) -> None:
            keep_metrics(self.trainer)

    named = names_module(argv)
    Cli(
        lightning.LightningModule if named else CausalLMModule,
        SFTDataModule,
        subclass_mode_model=named,
        # LightningCLI warns about `args` beside a command line, even if both are the same
        args=None if list(argv) == sys.argv[1:] else list(argv),
        save_config_callback=RunRecords,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lowrank-dist"},
    )
    return 0


@contextmanager
def no_garbage() -> Iterator[None]:
    """Inside, nobody looks for garbage: there is none while modules are imported, and it takes a sixth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Inside, ``sys.argv`` is that of ``lowrank-dist argv``."""
    before, sys.argv = sys.argv, ["lowrank-dist", *argv]
    try:
        yield
    finally:
        sys.argv = before


def names_module(argv: Sequence[str]) -> bool:
    """Whether arguments of a Trainer command, or a file of settings among them, name the class of the module."""
    files = []
    for place, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option in ("--model", "--model.class_path"):
            return True
        if option in ("--config", "-c"):
            files.append(value if equals else next(iter(argv[place + 1 :]), ""))
    for file in files:
        try:
            settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong with it
            continue
        model = settings.get("model") if isinstance(settings, dict) else None
        if isinstance(model, str) or (isinstance(model, dict) and "class_path" in model):
            return True
    return False


@cache
def fit_parser(*, named: bool = False) -> ArgumentParser:
    """The parser that LightningCLI builds in `run_trainer`; `named`: for settings that name the module's class."""
    argv = ["fit", "--model=lowrank_dist.CausalLMModule"] if named else ["fit"]
    with command_line(argv):
        return capture_parser(run_trainer, argv)


def module_settings(settings: Any) -> Any:
    """The options of the module in the settings from `parse_fit`, whether they name its class or not."""
    return settings.model.init_args if "class_path" in settings.model else settings.model


def module_class(settings: Any) -> Any:
    """The class of the module in the settings from `parse_fit`."""
    module, _, name = settings.model.get("class_path", "lowrank_dist.CausalLMModule").rpartition(".")
    return getattr(importlib.import_module(module), name)


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
        return fit_parser(named=names_module(argv)).parse_args(["fit", *argv]).fit


def instantiated(settings: Any, part: str) -> Any:
    """Instantiate `part` (``model``, ``data``) of the settings from `parse_fit`; for ``trainer`` return its options."""
    fit: Any = fit_parser(named="class_path" in settings.model)._subcommands_action.choices["fit"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
        return getattr(fit, "instantiate", fit.instantiate_classes)(settings)[part]
