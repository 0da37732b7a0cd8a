"""SLURM's commands where slurmctld is busy, or has been faster."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helpers.scripted_command import scripted
from lowrank_dist.cluster import allocation
from lowrank_dist.cluster.allocation import Allocation


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its file of answers (`scripted`). Pauses are short."""
    answers = scripted(tmp_path, "scontrol", [])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(allocation, "PAUSES", (0, 0, 0))
    for name, value in (("JOB_ID", 7), ("PROCID", 0), ("NTASKS", 1), ("LOCALID", 0), ("NODEID", 0), ("NNODES", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return answers


def current() -> Allocation:
    found = Allocation.current()
    assert found is not None
    return found


def test_a_busy_slurmctld_is_asked_again(scontrol: Path, caplog: pytest.LogCaptureFixture) -> None:
    busy = "1 Socket timed out on send/recv operation\n"
    scontrol.write_text(2 * busy + "0 JobState=RUNNING PreemptTime=2026-11-30T08:00:00\n")
    assert current().is_preempted()
    assert "scontrol show job 7: Socket timed out on send/recv operation; again in" in caplog.text
    scontrol.write_text(2 * busy + "0 \n")
    assert current().requeue() == 0


def test_a_job_that_slurm_has_requeued_itself_is_requeued(scontrol: Path) -> None:
    scontrol.write_text("1 Job is pending execution for job 7\n")
    assert current().requeue() == 0
    assert (scontrol.parent / "calls").read_text() == "scontrol requeue 7\n"


def test_a_refusal_is_an_error_in_the_end(scontrol: Path) -> None:
    scontrol.write_text("1 Requested operation is presently disabled\n")
    with pytest.raises(subprocess.CalledProcessError):
        current().requeue()
    assert (scontrol.parent / "calls").read_text() == 4 * "scontrol requeue 7\n"
