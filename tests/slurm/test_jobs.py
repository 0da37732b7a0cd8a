"""Jobs on a real SLURM, disturbed in every way that is known; each ends with the losses of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.slurm import STEPS, Job, Lab, added, arguments, losses, wait_for
from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint

pytestmark = [
    pytest.mark.slurm,
    # jsonargparse fills every option of the configuration in, and peft warns of this one
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored"),
]
CAPSYS = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def helpers_on_the_path() -> Any:
    """Jobs inherit the environment of who submits them."""
    before = os.environ.get("PYTHONPATH")
    tests = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = tests if before is None else f"{tests}{os.pathsep}{before}"
    yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, to the end."""
    import contextlib
    import io

    from lowrank_dist.cli import main

    root = tmp_path_factory.mktemp("undisturbed")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["submit", *arguments(material, root), "--follow"]) == 0
    job = Job(output.getvalue().split(":")[0].removeprefix("job "), root)
    assert f"job {job.id}: COMPLETED" in output.getvalue()  # what --follow says last
    assert "`Trainer.fit` stopped: `max_steps=10` reached." in output.getvalue()
    return job


def paced(material: Path, root: Path, *options: str, devices: int = 1, seconds: float = 1.0) -> list[str]:
    """Time to disturb a step, until there is a file `hurry`."""
    pace = added("Pace", seconds=seconds, hurry=str(root / "hurry"), record=str(root / "steps"))
    return [*arguments(material, root, devices=devices), pace, *options]


def assert_same_curve(root: Path, undisturbed: Job) -> None:
    """Bit for bit: the same ranks do the same arithmetic."""
    assert losses(root) == losses(undisturbed.root)


def saved_step(root: Path) -> int:
    newest = newest_checkpoint(root / "checkpoints")
    assert newest is not None
    return int(TrainingCheckpoint(newest).manifest["step"])


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


def test_preemption_by_a_higher_partition(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path, capsys: CAPSYS
) -> None:
    job = lab.submit(capsys, tmp_path, paced(material, tmp_path, "--partition=low"))
    job.wait_for_step(3)
    urgent = ["srun", "--partition=high", "--nodes=3", "--exclusive", "--time=1", "true"]
    subprocess.run(urgent, check=True, capture_output=True, timeout=120)
    (tmp_path / "hurry").touch()
    assert job.wait() == "COMPLETED"
    assert job.outcomes == ["requeued", "finished"]
    resumed_at = job.attempts[1]["step"]
    assert 3 <= resumed_at < STEPS
    done = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert done == list(range(STEPS))  # no step was lost, none was done twice
    assert_same_curve(tmp_path, undisturbed)


def test_time_limit(lab: Lab, material: Path, undisturbed: Job, tmp_path: Path, capsys: CAPSYS) -> None:
    job = lab.submit(capsys, tmp_path, paced(material, tmp_path, seconds=8))
    job.wait_for_step(3)
    lab.update(f"JobId={job.id}", "TimeLimit=4")  # USR2 is due 5 minutes before: now. SLURM looks every 30 s
    wait_for(lambda: job.outcomes == ["requeued"])
    (tmp_path / "hurry").touch()
    wait_for(lambda: job.state == "PENDING")
    lab.update(f"JobId={job.id}", "TimeLimit=20")
    assert job.wait() == "COMPLETED"
    assert job.outcomes == ["requeued", "finished"]
    assert_same_curve(tmp_path, undisturbed)


def test_scancel_saves_and_submitting_again_goes_on(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path, capsys: CAPSYS
) -> None:
    job = lab.submit(capsys, tmp_path, paced(material, tmp_path))
    job.wait_for_step(3)
    subprocess.run(["scancel", job.id], check=True, timeout=30)
    assert job.wait() == "CANCELLED"
    (tmp_path / "hurry").touch()
    wait_for(lambda: job.outcomes == ["stopped"])
    step = saved_step(tmp_path)
    assert job.attempts[-1]["step"] == step
    again = lab.submit(capsys, tmp_path, arguments(material, tmp_path))
    assert again.wait() == "COMPLETED"
    assert_same_curve(tmp_path, undisturbed)


def test_a_node_dies_and_the_job_goes_on_with_fewer(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path, capsys: CAPSYS
) -> None:
    """Two ranks do what four did: sums of gradients are rounded otherwise, hence a tolerance of fp32 rounding.

    Two ranks on a node: for one, SLURM 22.05 gives a range of nodes its least. It also asks for as many tasks as before
    when it requeues: an operator says that fewer will do.
    """
    wait_for(lab.nodes_idle)  # or the job would begin on fewer
    lab.update("NodeName=node3", "State=DRAIN", "Reason=test")
    try:
        job = lab.submit(capsys, tmp_path, paced(material, tmp_path, "--min-nodes=1", devices=2))
        job.wait_for_step(5)
        lab.script("kill-node", "node2")
        (tmp_path / "hurry").touch()
        wait_for(lambda: job.state == "PENDING")
        lab.update(f"JobId={job.id}", "NumTasks=2")
        assert job.wait() == "COMPLETED"
    finally:
        lab.script("start-node", "node2")
        lab.update("NodeName=node3", "State=RESUME")
        wait_for(lab.nodes_idle)
    assert [event["nodes"] for event in job.attempts if event["event"] == "begin"] == [["node1", "node2"], ["node1"]]
    assert job.outcomes == ["failed", "finished"]
    assert losses(tmp_path) == pytest.approx(losses(undisturbed.root), rel=1e-4)


def test_a_hanging_rank_is_given_up_and_the_job_starts_again(
    lab: Lab, material: Path, undisturbed: Job, tmp_path: Path, capsys: CAPSYS
) -> None:
    fault = added("FailAt", step=5, how="hang", times=1, marker=str(tmp_path / "marker"))
    job = lab.submit(capsys, tmp_path, [*arguments(material, tmp_path), fault, "--collective-timeout=0.25"])
    assert job.wait() == "COMPLETED"
    assert job.outcomes == ["failed", "finished"]
    (error,) = (event for event in job.attempts if event["event"] == "error")
    assert (error["node"], error["rank"]) == ("node1", 0)  # the one that waited
    assert_same_curve(tmp_path, undisturbed)


def test_a_rank_that_dies_twice_at_the_same_step_stops_the_job(
    lab: Lab, material: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    fault = added("FailAt", step=5, how="die", times=9, marker=str(tmp_path / "marker"))
    job = lab.submit(capsys, tmp_path, [*arguments(material, tmp_path), fault])
    assert job.wait() == "FAILED"
    assert (tmp_path / "marker").read_text() == "xx"
    assert job.outcomes == ["failed", "failed", "stopped"]
    assert "the job failed twice in a row after step 5 and is not started again" in job.log
    assert saved_step(tmp_path) == 4
