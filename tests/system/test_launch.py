"""One YAML launched by Lightning itself, by torchrun and under SLURM's environment; then loaded by stock PEFT.

Lightning and torchrun start interpreters, as for a user; SLURM's tasks fork from a server that has imported everything.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.command import LAUNCHERS, lowrank_dist, small_run

CLI = ["-m", "lowrank_dist.cli"]
STEPS = 4


def arguments(material: Path, output: Path) -> list[str]:
    own = {"--trainer.max_steps": STEPS, "--trainer.val_check_interval": STEPS}
    options = small_run(material, output) | own
    return ["fit", *(f"{key}={value}" for key, value in options.items())]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def by_lightning(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return interpreter([*CLI, *arguments])


def by_torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return interpreter(["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *CLI, *arguments])


def by_slurm(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """What ``srun --ntasks=2`` sets for its two tasks on one node."""
    common = {
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()),  # Lightning derives it from the number of the job, and it may be taken
        "SLURM_JOB_NAME": "qpissa",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
    }
    tasks = [{**common, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    return lowrank_dist(*arguments, environments=tasks)


def interpreter(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """One of its own, in this environment without a trace of a launcher."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    command, env = [sys.executable, *arguments], {**clean, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=480)


def test_a_bad_checkpoint_is_one_line_and_no_traceback(material: Path, tmp_path: Path) -> None:
    command = [*arguments(material, tmp_path), f"--trainer.strategy.init_args.pretrained={tmp_path / 'none'}"]
    done = lowrank_dist(*command, "--trainer.devices=1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"lowrank-dist fit: pretrained={str(tmp_path / 'none')!r}: no such directory"
    assert "Traceback" not in done.stderr + done.stdout
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]


@pytest.mark.parametrize("launch", [by_lightning, pytest.param(by_torchrun, marks=pytest.mark.matrix), by_slurm])
def test_fit_convert_and_load(material: Path, tmp_path: Path, launch: object) -> None:
    done = launch(arguments(material, tmp_path))  # type: ignore[operator]
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history["train"]] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in history["validation"]] == [0, STEPS]
    report = json.loads((tmp_path / "init_report.json").read_text())
    assert report["world_size"] == 2
    assert report["bytes_read"] == report["checkpoint_bytes"]
    checkpoint = tmp_path / "checkpoints" / f"step={STEPS}"
    if launch is by_lightning:
        done = lowrank_dist("convert", checkpoint, "--output", tmp_path / "lora")
        assert done.returncode == 0, done.stderr
        written = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
        assert written == (checkpoint / "lora" / "adapter_model.safetensors").read_bytes()
    base = AutoModelForCausalLM.from_pretrained(material / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, checkpoint / "lora")(ids).logits
    assert 0 < (after - before).abs().max() < 1
