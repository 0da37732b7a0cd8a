"""A sweep over methods on this machine, stopped by a signal and submitted again, and its runs compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.command import ROOT, lowrank_dist

METHODS = ROOT / "configs" / "method"
STEPS = 4


def configuration(material: Path, output: Path) -> Path:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": str(output), "version": ""}
    adapter = {"class_path": "peft.LoraConfig"}
    adapter["init_args"] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model, data = str(material / "model"), str(material / "data.jsonl")
    found = {
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1},
            **{"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1},
            **{"default_root_dir": str(output), "logger": logger, "enable_progress_bar": False},
            "strategy": {
                "class_path": "lowrank_dist.PiSSAStrategy",
                "init_args": {"pretrained": model, "adapter": adapter},
            },
        },
        "model": {"pretrained": model, "lr": 1e-2},
        "data": {"tokenizer": model, "train": data, "validation": data, "batch_size": 2},
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(found))
    return path


def events(output: Path) -> list[str]:
    """Begins and ends of all jobs, by time."""
    lines = [line for path in output.glob("jobs/*/*_attempts.jsonl") for line in path.read_text().splitlines()]
    return [entry["event"] for entry in sorted(map(json.loads, lines), key=lambda entry: entry["time"])]


@pytest.mark.matrix
def test_a_sweep_on_one_machine(material: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    files = ",".join(str(METHODS / f"{method}.yaml") for method in ("qpissa", "qlora"))
    argv = [f"--config={configuration(material, output)}", "--cluster=local", f"--sweep=config={files}"]
    command = [sys.executable, "-m", "lowrank_dist.cli", "submit", *argv, "--sweep=seed=1"]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None and not list(output.glob("jobs/*/*_step")):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=480)
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.splitlines()[-1] == "1 of 2 jobs were not started, because a signal stopped the sweep"
    assert events(output).count("begin") == 1

    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert events(output) == ["begin", "end"] * 3  # never two at a time

    found = lowrank_dist("compare", output, "--json", tmp_path / "out.json")
    assert found.returncode == 0, found.stderr
    compared = json.loads((tmp_path / "out.json").read_text())
    assert compared["step"] == STEPS
    runs = {method["name"]: method["runs"] for method in compared["methods"]}
    assert runs == {
        name: [str(output / f"config={method},seed=1" / method)]
        for name, method in (("PiSSA", "qpissa"), ("LoRA", "qlora"))
    }
    for method in compared["methods"]:
        assert method["loss"]["mean"] < method["loss_at_step_0"]["mean"]
        assert method["trained_parameters"]["mean"] > 0
        assert method["adapter_bytes"]["mean"] > 2 * method["trained_parameters"]["mean"]  # at least in bf16
        assert method["memory_gb"]["mean"] > 0
