"""What a job passes on to fit, and what follows a failure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.scripted_command import scripted
from lowrank_dist.slurm import TrainingJob
from lowrank_dist.slurm.job import requeue_script


def test_arguments_keep_the_step_on_fewer_nodes() -> None:
    job = TrainingJob(config=("c.yaml", "d.yaml"), overrides=(), folder="f", batches=32, grace=60, timeout=1.5)
    allocation: Any = SimpleNamespace(ranks=16, nodes=2, on_slurm=True)
    arguments = job.arguments(allocation)
    assert "--trainer.accumulate_grad_batches=2" in arguments
    assert "--trainer.strategy.init_args.timeout=0:01:30" in arguments
    assert "--ckpt_path=last" in arguments
    assert arguments[:3] == ["fit", "--config=c.yaml", "--config=d.yaml"]


def answers(directory: Path, squeue: list[str], scontrol: list[str]) -> dict[str, str]:
    """An environment with commands that give one answer after the other, the last for ever; empty: they fail."""
    for name, texts in (("squeue", squeue), ("scontrol", scontrol), ("sleep", ["slept"])):
        scripted(directory, name, [f"{0 if text else 1} {text}" for text in texts])
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def after_srun(
    status: int, folder: Path, environment: dict[str, str], *, plain: bool
) -> subprocess.CompletedProcess[str]:
    """What follows srun in the job of submitit, or in the plain file."""
    lines = requeue_script(str(folder))
    if plain:
        text = (Path(__file__).parents[3] / "launch" / "qpissa.sbatch").read_text().splitlines()
        lines = text[text.index("status=$?") :]
        environment = {**environment, "FOLDER": str(folder)}
    script = "\n".join([f"(exit {status})", *lines])
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("squeue", "scontrol", "requeues"),
    [
        pytest.param(["RUNNING", "PENDING"], ["done"], 1, id="at once"),
        pytest.param(["", "", "RUNNING", "PENDING"], ["done"], 1, id="squeue does not answer twice"),
        pytest.param(["RUNNING"], ["", "done"], 4, id="scontrol does not answer once"),
        pytest.param(["COMPLETING"], ["done"], 0, id="slurm ends the job"),
    ],
)
def test_a_failed_job_is_requeued_once_slurm_answers(
    squeue: list[str], scontrol: list[str], requeues: int, plain: bool, tmp_path: Path
) -> None:
    ended = after_srun(1, tmp_path, answers(tmp_path, squeue, scontrol), plain=plain)
    assert ended.returncode == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count("scontrol requeue 7") == requeues
    assert calls.count("squeue --noheader --jobs=7 --format=%T") == 4
    assert f"job 7 is {squeue[0] or 'in a state that squeue did not say'}" in ended.stdout


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_has_ended_or_was_stopped_asks_nothing(status: int, plain: bool, tmp_path: Path) -> None:
    if status:
        (tmp_path / "7.stopped").touch()
    ended = after_srun(status, tmp_path, answers(tmp_path, ["RUNNING"], ["done"]), plain=plain)
    assert ended.returncode == status
    assert not (tmp_path / "calls").exists()
