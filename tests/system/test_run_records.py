"""What a fit leaves beside its checkpoints stays that of the fit: over attempts, evaluations and refused runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from helpers.command import lowrank_dist, small_run
from lowrank_dist.callbacks.run_lock import hold, let_go

STEPS = 4
RECORDS = ("config.yaml", "history.json", "metrics.csv")


def run(command: str, material: Path, output: Path, *more: str) -> CompletedProcess[str]:
    own = {"--trainer.devices": 1, "--trainer.max_steps": STEPS, "--trainer.val_check_interval": 2}
    options = small_run(material, output) | own
    return lowrank_dist(command, *(f"{key}={value}" for key, value in options.items()), *more)


def records(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for name in RECORDS for path in output.rglob(name) if "test" not in path.parts}


def metrics(output: Path) -> list[int]:
    """Steps of the rows with a loss, as Lightning counts them."""
    with (output / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture(scope="module")
def once(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("once") / "run"
    done = run("fit", material, output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(records(output)) == set(RECORDS)
    return output


@pytest.fixture
def fitted(once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(once, tmp_path / "run")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_leaves_them_alone(material: Path, fitted: Path, command: str) -> None:
    before = records(fitted)
    more = [f"--ckpt_path={fitted / 'checkpoints' / f'step={STEPS}'}", "--model.lr=5"]
    done = run(command, material, fitted, *more, f"--data.test={material / 'data.jsonl'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: (fitted / name).read_bytes() for name in RECORDS} == before
    assert (fitted / command / "metrics.csv").is_file()


def test_a_resumed_run_goes_on_in_them(material: Path, fitted: Path) -> None:
    assert metrics(fitted) == list(range(STEPS))
    done = run("fit", material, fitted, "--ckpt_path=last", f"--trainer.max_steps={STEPS + 2}", "--model.lr=0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = metrics(fitted)
    assert steps[:STEPS] == list(range(STEPS))
    assert steps[STEPS:] in ([STEPS, STEPS + 1], [STEPS + 1, STEPS + 2])  # Lightning counts a repeated validation too
    history = json.loads((fitted / "history.json").read_text())
    assert [entry["step"] for entry in history["train"]] == list(range(1, STEPS + 3))
    assert "is resumed with lr=0.5 (was 0.0003): optimizer and learning rates go on as in the checkpoint" in done.stderr


def test_a_run_that_is_refused_leaves_them_alone(material: Path, fitted: Path) -> None:
    before, held = records(fitted), hold(fitted / "checkpoints")
    try:
        done = run("fit", material, fitted, "--model.lr=0.7")
    finally:
        let_go(held)
    assert done.returncode == 1
    assert "another run is writing it" in done.stderr or "two runs in one dirpath" in done.stderr
    assert records(fitted) == before
    assert yaml.safe_load(before["config.yaml"])["model"]["lr"] != 0.7
