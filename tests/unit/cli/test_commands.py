"""The command line: help for everything, and one line for what is wrong."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from jsonargparse import ArgumentParser, capture_parser
from peft import LoraConfig

import lowrank_dist
from helpers.checkpoints import make_checkpoint
from helpers.models import save_checkpoint
from lowrank_dist import cli
from lowrank_dist.cli import (
    convert,
    data,
    decompose,
    demo,
    evaluate,
    generate,
    import_weights,
    inspect,
    merge,
    push,
    report,
    submit,
)
from lowrank_dist.cli.commands import COMMANDS, READER_GONE
from lowrank_dist.cli.compare import command as compare
from lowrank_dist.cli.plan import command as plan
from lowrank_dist.methods import METHODS
from lowrank_dist.training.fit_cli import TRAINER_COMMANDS, run_trainer


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
    modules = {"convert": convert, "demo": demo, "inspect": inspect, "merge": merge, "plan": plan}
    modules |= {"data": data, "import": import_weights, "push": push, "report": report, "submit": submit}
    modules |= {"compare": compare, "evaluate": evaluate, "generate": generate}
    assert {*modules, "decompose", *TRAINER_COMMANDS} == COMMANDS.keys()
    own = {name: module.parser() for name, module in modules.items()}
    assert {name: parser.prog for name, parser in own.items()} == {name: f"lowrank-dist {name}" for name in own}
    return own | {f"decompose --method {method}": decompose.parser(method) for method in METHODS}


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
    assert all(option in output for option in expected) or command not in TRAINER_COMMANDS


def test_own_options_are_documented() -> None:
    for name, parser in own_parsers().items():
        assert parser.description, name
        assert [a.dest for a in parser._actions if not a.help] == [], name


@pytest.mark.parametrize("command", sorted(TRAINER_COMMANDS))
def test_options_of_model_and_data_are_documented(command: str) -> None:
    with patch.object(sys, "argv", ["lowrank-dist", command]):
        parser = capture_parser(run_trainer, [command])
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
    "name",
    ["PiSSAStrategy", "NF4", "PiSSA", "LoftQ", "LoRA", "AdapterCheckpoint", "InitReport", "LossHistory", "Preemption"],
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


def checkpoint(tmp_path: Path, base: Path, rank: int = 12, **options: object) -> str:
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["o_proj", "down_proj"], **options)
    return str(make_checkpoint(tmp_path / "step", base, config).directory)


@pytest.mark.parametrize("rank", ["0", "-3", "25"])
def test_convert_refuses_a_rank_in_one_line(
    rank: str, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = checkpoint(tmp_path, llama)
    capsys.readouterr()
    status, output, error = run(capsys, "convert", directory, "--output", str(tmp_path / "lora"), "--rank", rank)
    assert (status, output) == (1, "")
    assert error == (
        f"lowrank-dist convert: rank={rank}: the exact LoRA has rank 24; choose one from 1 to 24, or leave it out for "
        "the exact LoRA\n"
    )
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("options", [("--rank", "many"), ("--dtype", "int8")])
def test_convert_refuses_what_is_no_option(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    status, output, error = run(capsys, "convert", "step", "--output", "lora", *options)
    assert (status, output) == (2, "")
    assert options[0] in error
    assert options[1] in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rank=2", "--devices=4"], "--devices 4: ranks share a fit only; leave it out, or pass --base too"),
        (["--rank=2", "--base=original", "--devices=0"], "--devices 0 must be at least 1"),
        (["--rank=2", "--pretrained=there"], "leave pretrained and revision out, or fit it to the original"),
    ],
)
def test_convert_refuses_options_without_effect(
    options: list[str], says: str, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, "convert", checkpoint(tmp_path, llama), "--output", str(tmp_path / "x"), *options)
    assert status == 1
    assert says in error.splitlines()[-1]


ENERGY = r"\d+\.\d{4}% of the update's energy, at least \d+\.\d{4}% \(model\.layers\.\d\.[a-z_.]+\)\."
BUFFERS = r"vLLM's --max-lora-rank is one of 1, 8, 16, 32, 64, 128, 256, 320, 512: rank {} needs 32\."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [BUFFERS.format(24), f"--rank 16 keeps {ENERGY}"]),
        (("--dtype", "bfloat16"), [BUFFERS.format(24), f"--rank 16 keeps {ENERGY}"]),
        (("--rank", "16"), [f"Rank 16 of 24 keeps {ENERGY}"]),
        (
            ("--rank", "24"),
            ["Rank 24 of 24 keeps all of the update's energy.", BUFFERS.format(24), f"--rank 16 keeps {ENERGY}"],
        ),
    ],
)
def test_convert_says_what_is_kept(
    arguments: tuple[str, ...], expected: list[str], tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, lora = checkpoint(tmp_path, llama), str(tmp_path / "lora")
    capsys.readouterr()
    status, output, error = run(capsys, "convert", directory, "--output", lora, *arguments)
    assert status == 0
    path, *lines = output.splitlines()
    assert path == lora
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    assert "4/4" in error  # the progress bar: two modules in two layers


def test_convert_says_little_of_what_servers_take(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, lora = checkpoint(tmp_path, llama, rank=4), str(tmp_path / "lora")
    capsys.readouterr()
    status, output, _ = run(capsys, "convert", directory, "--output", lora, "--rank", "8", "--dtype", "float16")
    assert (status, output) == (0, f"{lora}\nRank 8 of 8 keeps all of the update's energy.\n")


def test_convert_of_unequal_ranks(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoint(tmp_path, llama, rank=4, rank_pattern={"o_proj": 2})
    capsys.readouterr()
    _, output, _ = run(capsys, "convert", directory, "--output", str(tmp_path / "lora"))
    assert "Its ranks differ (rank_pattern). vLLM 0.33 and llama.cpp take that, SGLang does not" in output
    assert "--rank 8 keeps all of the update's energy." in output


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    """As in ``lowrank-dist ... | head``, which reads no further."""
    save_checkpoint(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lowrank_dist.cli", "inspect", str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


@pytest.mark.parametrize("command", ["convert", "convert --rank=2 --base=original", "merge", "import", "generate"])
def test_where_nothing_can_be_written_is_said_before_the_work(
    command: str, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers above all would be lost."""
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("one")
    name, *options = command.split()
    if name == "generate":
        options = ["--prompts", str(tmp_path / "prompts.txt"), "--accelerator=cpu"]
    source = checkpoint(tmp_path, llama) if name in ("convert", "merge") else str(llama)
    capsys.readouterr()
    status, output, error = run(capsys, name, source, "--output", str(tmp_path / "file" / "out"), *options)
    assert (status, output) == (1, "")
    said = f"nothing can be written in {tmp_path / 'file'} (Not a directory); choose another path"
    assert error.splitlines()[-1] == f"lowrank-dist {name}: {tmp_path / 'file' / 'out'}: {said}"


def failing(_: list[str]) -> int:
    raise PermissionError(13, "Permission denied", "/data/model")


def test_an_error_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """But in a run of Lightning, whose traceback says what was under way."""
    with patch("lowrank_dist.cli.commands._imported", return_value=failing):
        assert run(capsys, "inspect") == (1, "", "lowrank-dist inspect: /data/model: Permission denied\n")
        with pytest.raises(PermissionError):
            run(capsys, "fit")
