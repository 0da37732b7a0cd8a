"""Jobs on a real SLURM, disturbed in every way that is known; each ends with the losses of an undisturbed run.

Jobs that wait most of their time, for a timeout or for SLURM, are started at the beginning, on nodes of their own, and
looked at when they are due.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.slurm import (
    STEPS,
    Job,
    Lab,
    added,
    arguments,
    assert_no_step_was_lost,
    assert_same_curve,
    losses,
    paced,
    saved_step,
    wait_for,
)

pytestmark = [
    pytest.mark.slurm,
    # jsonargparse fills every option of the configuration in, and peft warns of this one
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored"),
]


@pytest.fixture(scope="session")  # as `undisturbed`, before which it is made
def beside(lab: Lab, material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that the tests come back to."""
    root = {name: tmp_path_factory.mktemp(name) for name in ("limited", "hanging", "dying")}
    hang = added("FailAt", step=5, how="hang", times=1, marker=str(root["hanging"] / "marker"))
    die = added("FailAt", step=5, how="die", times=9, marker=str(root["dying"] / "marker"))
    argv = {
        # SLURM looks at limits every 30 s: USR2 comes 60 to 90 s after the beginning
        "limited": paced(material, root["limited"], "--time=4", "--grace=150", seconds=12),
        "hanging": [*arguments(material, root["hanging"]), hang, "--collective-timeout=1"],
        "dying": [*arguments(material, root["dying"]), die],
    }
    return {name: lab.submit(root[name], [*argv[name], "--partition=beside"])[0] for name in argv}


@pytest.mark.usefixtures("beside")
def test_two_nodes_to_the_end(undisturbed: Job) -> None:
    assert list(losses(undisturbed.root)) == list(range(1, STEPS + 1))
    assert losses(undisturbed.root)[STEPS] < losses(undisturbed.root)[1]
    begin, end = undisturbed.attempts
    assert begin["nodes"] == ["node1", "node2"]
    assert (end["outcome"], end["step"]) == ("finished", STEPS)
    assert undisturbed.folder.stat().st_mode & 0o777 == 0o700
    log = undisturbed.log
    assert "[node1 0] node " in log  # the table of the health check
    assert "[node2 1] " in log


def test_a_sweep_is_an_array_of_jobs_with_outputs_of_their_own(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path
) -> None:
    """The first point has the settings of the undisturbed run, on one rank: equal up to fp32 rounding."""
    given = [one for one in arguments(material, tmp_path, nodes=1) if not one.startswith("--model.lr=")]
    jobs = lab.submit(tmp_path, [*given, "--sweep=lr=0.01,0.001"])
    assert [job.id.partition("_")[2] for job in jobs] == ["0", "1"]
    assert [job.root for job in jobs] == [tmp_path / "lr=0.01", tmp_path / "lr=0.001"]
    for job in jobs:
        assert job.wait() == "COMPLETED"
        assert job.outcomes == ["finished"]
        assert saved_step(job.root) == STEPS
    first, second = (losses(job.root) for job in jobs)
    assert first == pytest.approx(losses(undisturbed.root), rel=1e-4)
    assert second[1] == pytest.approx(first[1], rel=1e-4)
    assert second[STEPS] > first[STEPS]  # it learns more slowly


def test_on_this_machine_without_slurm(material: Path, undisturbed: Job, tmp_path: Path) -> None:
    """SIGUSR2 starts it again, SIGTERM ends it; in between it trains what the undisturbed run trains."""
    argv = paced(material, tmp_path, "--cluster=local", nodes=1, devices=2)
    command = [sys.executable, "-m", "lowrank_dist.cli", "submit", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: list(tmp_path.glob("jobs/*/*_step")) or process.poll() is not None)
        (path,) = tmp_path.glob("jobs/*/*_step")
        job = Job(path.name.partition("_")[0], path.parent, tmp_path)
        for step, number, outcome in ((3, signal.SIGUSR2, "requeued"), (7, signal.SIGTERM, "stopped")):
            wait_for(lambda step=step: job.step() >= step or process.poll() is not None)
            process.send_signal(number)
            wait_for(lambda outcome=outcome: outcome in job.outcomes or process.poll() is not None)
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert job.outcomes == ["requeued", "stopped"], said
    assert said.splitlines()[-1] == f"job {job.id}: CANCELLED"
    assert process.returncode == 1
    done = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert done == list(range(saved_step(tmp_path)))
    for name in ("adapter", "lora"):
        file = f"checkpoints/step=6/{name}/adapter_model.safetensors"
        assert (tmp_path / file).read_bytes() == (undisturbed.root / file).read_bytes()


def test_scancel_saves_and_submitting_again_goes_on(lab: Lab, material: Path, undisturbed: Job, tmp_path: Path) -> None:
    (job,) = lab.submit(tmp_path, paced(material, tmp_path))
    job.wait_for_step(3)
    subprocess.run(["scancel", job.id], check=True, timeout=60)
    assert job.wait() == "CANCELLED"
    wait_for(lambda: job.outcomes == ["stopped"])
    assert job.attempts[-1]["step"] == saved_step(tmp_path)
    (again,) = lab.submit(tmp_path, arguments(material, tmp_path))
    assert again.wait() == "COMPLETED"
    assert_same_curve(tmp_path, undisturbed)


def test_time_limit(beside: dict[str, Job], undisturbed: Job) -> None:
    """However often it is reached: on a slow machine the second attempt reaches it too."""
    job = beside["limited"]
    assert job.wait() == "COMPLETED"
    *before, last = job.outcomes
    assert set(before) == {"requeued"}
    assert last == "finished"
    assert_no_step_was_lost(job.root)
    assert_same_curve(job.root, undisturbed)


def test_a_hanging_rank_is_given_up_and_the_job_starts_again(beside: dict[str, Job], undisturbed: Job) -> None:
    job = beside["hanging"]
    assert job.wait() == "COMPLETED"
    assert job.outcomes == ["failed", "finished"]
    (error,) = (event for event in job.attempts if event["event"] == "error")
    assert (error["node"], error["rank"]) == ("node4", 0)  # the one that waited
    assert_same_curve(job.root, undisturbed)


def test_a_rank_that_dies_twice_at_the_same_step_stops_the_job(beside: dict[str, Job]) -> None:
    job = beside["dying"]
    assert job.wait() == "FAILED"
    assert (job.root / "marker").read_text() == "xx"
    assert job.outcomes == ["failed", "failed", "stopped"]
    assert "the job failed twice in a row after step 5 and is not started again" in job.log
    assert saved_step(job.root) == 4
