"""A SLURM on loopback, and jobs of the tiny model on it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint
from lowrank_dist.cli import main

SCRIPT = Path(__file__).parents[1] / "slurm" / "lab.sh"
CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m_qpissa_2cpu.yaml"
STEPS = 10
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def arguments(material: Path, root: Path, *, nodes: int = 2, devices: int = 1) -> list[str]:
    """Of ``lowrank-dist submit``: QPiSSA of the tiny model, a checkpoint every second step."""
    strategy = "--trainer.strategy.init_args"
    options = {
        "--config": CONFIG,
        "--model.pretrained": material / "model",
        "--model.lr": 1e-2,
        f"{strategy}.pretrained": material / "model",
        f"{strategy}.adapter.init_args.r": 4,
        # the cost model is measured anew in every run, and what is shared otherwise is rounded otherwise
        f"{strategy}.ranks_per_matrix": 1,
        "--data.tokenizer": material / "model",
        "--data.train": material / "data.jsonl",
        "--data.validation": material / "data.jsonl",
        "--trainer.default_root_dir": root,
        "--trainer.logger": "false",
        "--trainer.callbacks": json.dumps(
            [
                {
                    "class_path": "lowrank_dist.AdapterCheckpoint",
                    "init_args": {
                        "filename": "{step}",
                        "every_n_train_steps": 2,
                        "save_top_k": -1,
                    },
                },
                {"class_path": "lowrank_dist.LossHistory", "init_args": {"path": "history.json"}},
            ]
        ),
        "--trainer.max_steps": STEPS,
        "--trainer.val_check_interval": STEPS,
        "--trainer.num_sanity_val_steps": 0,
        "--trainer.precision": "32-true",
        "--trainer.num_nodes": nodes,
        "--trainer.devices": devices,
        "--trainer.accumulate_grad_batches": 4 // (nodes * devices),  # always four batches of one example a step
        "--time": 20,
        "--grace": 300,
    }
    return [f"{key}={value}" for key, value in options.items()]


def added(name: str, **init_args: object) -> str:
    """Another callback, of `helpers.pace`."""
    return "--trainer.callbacks+=" + json.dumps({"class_path": f"helpers.pace.{name}", "init_args": init_args})


def paced(material: Path, root: Path, *options: str, nodes: int = 2, devices: int = 1, seconds: float = 1) -> list[str]:
    """Arguments of a job whose steps leave time to disturb it."""
    pace = added("Pace", seconds=seconds, record=str(root / "steps"))
    return [*arguments(material, root, nodes=nodes, devices=devices), pace, *options]


def losses(root: Path) -> dict[int, float]:
    """Training losses by step, over all attempts."""
    return {entry["step"]: entry["loss"] for entry in json.loads((root / "history.json").read_text())["train"]}


def wait_for(what: Callable[[], Any], timeout: float = 400) -> Any:
    """Until `what` gives something true; returns it."""
    deadline = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.2)
    return value


class Job:
    """A job: `folder` has its logs and its record of attempts, `root` what it trains."""

    def __init__(self, job_id: str, folder: Path, root: Path) -> None:
        self.id, self.folder, self.root = job_id, folder, root

    @property
    def state(self) -> str:
        command = ["squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--format=%T"]
        # nothing where slurmctld does not answer in time: whoever waits asks again
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{self.id}_*_log.out")))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / f"{self.id}_attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def outcomes(self) -> list[str]:
        return [event["outcome"] for event in self.attempts if event["event"] == "end"]

    def step(self) -> int:
        """Steps that are done, of those of an earlier attempt as long as the present one has done none."""
        path = self.folder / f"{self.id}_step"
        try:
            return int(path.read_text() or 0)
        except FileNotFoundError:
            return 0

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are done; fails at once where the job has ended before."""
        wait_for(lambda: self.step() >= step or self.state in ENDED)
        assert self.step() >= step, self.log

    def wait(self) -> str:
        """Until it has ended; returns its state."""
        return str(wait_for(lambda: self.state in ENDED and self.state))


def announced(root: Path, said: str) -> list[Job]:
    """The jobs that ``lowrank-dist submit`` has printed."""
    lines = re.findall(r"^job (\S+): \S+ in ([^,\n]+)(?:, resumes .*)?$", said, flags=re.MULTILINE)
    found = {job_id: Path(of_job) for job_id, of_job in lines}
    folders = {job_id: next(root.glob(f"jobs/*/{job_id}_submitted.pkl")).parent for job_id in found}
    return [Job(job_id, folders[job_id], found[job_id]) for job_id in found]


class Lab:
    """The running SLURM."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def script(self, action: str, *arguments: str) -> None:
        subprocess.run([SCRIPT, action, self.directory, *arguments], check=True, timeout=120)

    @contextmanager
    def without(self, option: str) -> Iterator[None]:
        """SLURM with the default of an option of slurm.conf."""
        lines = (self.directory / "etc" / "slurm.conf").read_text().splitlines()
        (value,) = (line.partition("=")[2] for line in lines if line.startswith(f"{option}="))
        self.script("set", option)
        try:
            yield
        finally:
            self.script("set", option, value)

    def submit(self, root: Path, argv: list[str]) -> list[Job]:
        """``lowrank-dist submit argv``, the jobs that it says it has submitted."""
        with redirect_stdout(StringIO()) as said:
            assert main(["submit", *argv]) == 0
        return announced(root, said.getvalue())

    def update(self, *settings: str) -> None:
        subprocess.run(["scontrol", "update", *settings], check=True, timeout=30)

    def nodes_idle(self) -> bool:
        """Those of the partition `high`."""
        command = ["sinfo", "--noheader", "--Node", "--partition=high", "--format=%t"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True)
        return set(shown.stdout.split()) == {"idle"}


def assert_same_curve(root: Path, undisturbed: Job) -> None:
    """Bit for bit: the same ranks do the same arithmetic."""
    assert losses(root) == losses(undisturbed.root)


def assert_no_step_was_lost(root: Path) -> None:
    """Or done twice."""
    assert [int(line) for line in (root / "steps").read_text().split()] == list(range(STEPS))


def saved_step(root: Path) -> int:
    newest = newest_checkpoint(root / "checkpoints")
    assert newest is not None
    return int(TrainingCheckpoint(newest).manifest["step"])
