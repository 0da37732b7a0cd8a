"""Jobs on a real SLURM, disturbed in every way that is known; each ends with the losses of an undisturbed run.

Jobs that wait most of their time, for a timeout or for SLURM, are started at the beginning, on nodes of their own, and
looked at when they are due.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from helpers.slurm import STEPS, Job, Lab, added, announced, arguments, losses, wait_for
from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint
from lowrank_dist.cli import main

pytestmark = [
    pytest.mark.slurm,
    # jsonargparse fills every option of the configuration in, and peft warns of this one
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored"),
]
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module", autouse=True)
def environment_of_jobs() -> Iterator[None]:
    """Jobs inherit the environment of who submits them: they find the helpers of the tests, and this Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


def paced(material: Path, root: Path, *options: str, nodes: int = 2, devices: int = 1, seconds: float = 1) -> list[str]:
    """Arguments of a job whose steps leave time to disturb it."""
    pace = added("Pace", seconds=seconds, record=str(root / "steps"))
    return [*arguments(material, root, nodes=nodes, devices=devices), pace, *options]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, to the end."""
    root = tmp_path_factory.mktemp("undisturbed")
    with redirect_stdout(StringIO()) as output:
        assert main(["submit", *arguments(material, root), "--follow"]) == 0
    (job,) = announced(root, output.getvalue())
    assert f"job {job.id}: COMPLETED" in output.getvalue()  # what --follow says last
    assert "`Trainer.fit` stopped: `max_steps=10` reached." in output.getvalue()
    return job


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


def preempt() -> None:
    """A job of the higher partition that wants all nodes, and has come to its end."""
    urgent = ["srun", "--partition=high", "--nodes=3", "--exclusive", "--time=1", "true"]
    subprocess.run(urgent, check=True, capture_output=True, timeout=240)


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
    jobs = lab.submit(tmp_path, [*arguments(material, tmp_path, nodes=1), "--sweep=lr=0.01,0.001"])
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
