"""Jobs on a real SLURM that lose their nodes, to another job or to a failure; each ends with the undisturbed losses.

They want the whole of it, and run one after the other, beside `test_jobs.py` on another worker's.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers.slurm import (
    STEPS,
    Job,
    Lab,
    assert_no_step_was_lost,
    assert_same_curve,
    losses,
    paced,
    wait_for,
)

pytestmark = [
    pytest.mark.slurm,
    # jsonargparse fills every option of the configuration in, and peft warns of this one
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored"),
]
LAUNCH = Path(__file__).parents[2] / "launch"


def preempt() -> None:
    """A job of the higher partition that wants all nodes, and has come to its end."""
    urgent = ["srun", "--partition=high", "--nodes=3", "--exclusive", "--time=1", "true"]
    subprocess.run(urgent, check=True, capture_output=True, timeout=240)


def test_preemption_by_a_higher_partition(lab: Lab, material: Path, undisturbed: Job, tmp_path: Path) -> None:
    (job,) = lab.submit(tmp_path, paced(material, tmp_path, "--partition=low"))
    job.wait_for_step(3)
    preempt()
    assert job.wait() == "COMPLETED"
    assert job.outcomes == ["requeued", "finished"]
    assert 3 <= job.attempts[1]["step"] < STEPS
    assert_no_step_was_lost(tmp_path)
    assert_same_curve(tmp_path, undisturbed)


def test_the_plain_file_on_a_site_that_preempts_with_sigterm(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path
) -> None:
    """Its own options, but for the size of the job; SLURM sends SIGTERM at the beginning of the grace period."""
    config, *overrides = paced(material, tmp_path)
    options = ["--partition=low", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=20"]
    overrides = [option for option in overrides if not option.startswith(("--time", "--grace"))]
    log = tmp_path / "log"
    settings = {"CONFIG": config.partition("=")[2], "FOLDER": str(tmp_path / "jobs"), "BATCHES": "4"}
    with lab.without("SlurmctldParameters"):
        submitted = subprocess.run(
            ["sbatch", "--parsable", f"--output={log}", *options, LAUNCH / "qpissa.sbatch", *overrides],
            env={**os.environ, **settings},
            check=True,
            capture_output=True,
            text=True,
        )
        job = Job(submitted.stdout.strip(), tmp_path / "jobs", tmp_path)
        job.wait_for_step(3)
        preempt()
    assert job.wait() == "COMPLETED", log.read_text()
    assert job.outcomes == ["requeued", "finished"]
    assert_no_step_was_lost(tmp_path)
    assert_same_curve(tmp_path, undisturbed)
    assert job.folder.stat().st_mode & 0o777 == 0o700


def test_a_node_dies_and_the_job_goes_on_with_fewer(lab: Lab, material: Path, undisturbed: Job, tmp_path: Path) -> None:
    """One rank does what two did: sums of gradients are rounded otherwise, hence a tolerance of fp32 rounding."""
    wait_for(lab.nodes_idle)  # or the job would begin on fewer
    lab.update("NodeName=node3", "State=DRAIN", "Reason=test")
    try:
        (job,) = lab.submit(tmp_path, paced(material, tmp_path, "--min-nodes=1"))
        job.wait_for_step(5)
        lab.script("kill-node", "node2")
        assert job.wait() == "COMPLETED"
    finally:
        lab.script("start-node", "node2")
        lab.update("NodeName=node3", "State=RESUME")
        wait_for(lab.nodes_idle)
    assert [event["nodes"] for event in job.attempts if event["event"] == "begin"] == [["node1", "node2"], ["node1"]]
    assert job.outcomes == ["failed", "finished"]
    assert losses(tmp_path) == pytest.approx(losses(undisturbed.root), rel=1e-4)
