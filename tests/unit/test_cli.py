"""The command line: help for everything, and one line for what is wrong."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from jsonargparse import ArgumentParser, capture_parser

import lowrank_dist
from lowrank_dist import cli
from lowrank_dist.cli import decompose
from lowrank_dist.methods import METHODS

COMMANDS = {"fit", "validate", "test", "decompose", "convert", "merge", "inspect", "report", "demo"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``lowrank-dist ARGUMENTS``."""
    with patch.object(sys, "argv", ["lowrank-dist", *arguments]):
        try:
            status = cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return status, *capsys.readouterr()


def own_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands that are not LightningCLI's."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == COMMANDS
    assert {choice.dest for choice in commands._choices_actions if choice.help} == COMMANDS
    elsewhere = {*cli.TRAINER_COMMANDS, "decompose"}
    own = {name: parser for name, parser in commands.choices.items() if name not in elsewhere}
    return own | {f"decompose --method {method}": decompose._parser(method) for method in METHODS}


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run(capsys, "--help")
    assert status == 0
    assert all(re.search(rf"^    {command}\s+\w", output, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, command, "--help")
    assert (status, error) == (0, "")
    assert "--help" in output
    expected = ["--config", "--trainer.strategy", "--model.lr", "--data.train"]
    assert all(option in output for option in expected) or command not in cli.TRAINER_COMMANDS


def test_own_options_are_documented() -> None:
    for name, parser in own_parsers().items():
        assert parser.description, name
        assert [a.dest for a in parser._actions if not a.help] == [], name


@pytest.mark.parametrize("command", sorted(cli.TRAINER_COMMANDS))
def test_options_of_model_and_data_are_documented(command: str) -> None:
    with patch.object(sys, "argv", ["lowrank-dist", command]):
        parser = capture_parser(cli.run_trainer, [command])
    options = parser._subcommands_action.choices[command]._actions
    ours = {a.dest: a.help for a in options if a.dest.startswith(("model.", "data."))}
    assert {"model.lr", "model.optimizer", "data.train", "data.packing"} <= set(ours)
    assert [name for name, text in ours.items() if not text] == []


# of Lightning's DeepSpeedStrategy, which says nothing of them
UPSTREAM = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "precision_plugin",
    "process_group_backend",
    "timeout",
}


@pytest.mark.parametrize(
    "name", ["PiSSAStrategy", "NF4", "PiSSA", "LoftQ", "LoRA", "AdapterCheckpoint", "InitReport", "LossHistory"]
)
def test_classes_named_in_configurations_are_documented(name: str) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(lowrank_dist, name), "of")
    undocumented = {action.dest.removeprefix("of.") for action in parser._actions if not action.help}
    assert undocumented == (UPSTREAM if name == "PiSSAStrategy" else set())


def test_help_of_the_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run(capsys, "fit", "--trainer.strategy.help", "lowrank_dist.PiSSAStrategy")
    assert status == 0
    assert "--trainer.strategy.live_layers" in output
    assert "Recompute activations layer by layer in backward" in re.sub(r"\s+", " ", output)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"{lowrank_dist.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("frobnicate",), ()])
def test_an_unknown_or_missing_command_exits_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, *arguments)
    assert (status, output) == (2, "")
    assert all(command in error for command in COMMANDS) or not arguments


def test_convert_of_a_wrong_directory_is_one_line(tmp_path: Path) -> None:
    """As a user sees it, in a process of its own: nothing but that line, and nothing written."""
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_dist.cli", "convert", str(tmp_path), "--output", str(tmp_path / "lora")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"lowrank-dist convert: {tmp_path}: holds no lowrank_dist.json; pass a directory")
    assert not (tmp_path / "lora").exists()


def test_convert_needs_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "convert", str(tmp_path))
    assert status == 2
    assert "--output" in error
