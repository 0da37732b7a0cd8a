"""What a job is refused for before it is submitted, the text for sbatch, and the record of attempts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.cli import main
from lowrank_dist.cluster.attempts import AttemptLog, RepeatedFailureError
from lowrank_dist.cluster.health import NodeHealth, slow_nodes
from lowrank_dist.cluster.signals import Request, StopSignals
from lowrank_dist.slurm import SubmitError, SubmitOptions, TrainingJob
from lowrank_dist.slurm.checks import accumulated
from lowrank_dist.slurm.environment import PrefixedStream, interface_to
from lowrank_dist.slurm.options import point_overrides

CONFIG = str(Path(__file__).parents[3] / "configs" / "llama3-70b_qpissa_32gpu.yaml")
# jsonargparse fills every option of the configuration in, and peft warns of this one
pytestmark = pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")


@pytest.fixture
def no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of SLURM that fail the test when they are run."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sbatch", "srun"):
        program = directory / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)


REFUSED = {
    "nodes": (["--nodes=2"], "--nodes 2, but trainer.num_nodes is 4"),
    "gpus": (["--gpus-per-node=4"], "--gpus-per-node 4, but trainer.devices is 8"),
    "fewer nodes": (["--min-nodes=3"], "a step of 32 batches cannot be split evenly over 3 nodes of 8 ranks"),
    "more nodes": (["--min-nodes=5"], "--min-nodes 5 is more than trainer.num_nodes=4"),
    "no time": (["--time=0"], "--time 0 must be positive"),
    "bad time": (["--time=tomorrow"], "--time tomorrow: write MINUTES"),
    "grace": (["--time=5", "--grace=300"], "--grace 300 s must be shorter than --time 5"),
    "interval": (["--time=1:00:00", "--seconds-per-step=60"], "a checkpoint every 3:20:00 and --time 1:00:00"),
    "path": (["--data.train=no/such/file.jsonl"], "no/such/file.jsonl does not exist; give a path"),
    "model": (["--trainer.strategy.init_args.pretrained=/no/such"], "pretrained=/no/such: /no/such does not exist"),
    "no checkpoints": (["--trainer.callbacks=[]"], "has no lowrank_dist.AdapterCheckpoint"),
    "auto_requeue": (
        ["--trainer.plugins=lightning.pytorch.plugins.environments.SLURMEnvironment"],
        "a SLURMEnvironment with auto_requeue on",
    ),
    "local": (["--cluster=local"], "--cluster local is one machine, but trainer.num_nodes is 4"),
    "cluster": (["--cluster=pbs"], "--cluster pbs: unknown; choose one of slurm, local"),
    "sweep": (["--sweep=rank"], "--sweep rank: write KEY=VALUE,VALUE"),
    "accelerator": (["--trainer.accelerator=auto"], "the nodes may differ from this machine"),
    "unknown option": (["--partiton=x"], "--partiton is neither an option of submit"),
}


@pytest.mark.usefixtures("no_sbatch")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_before_sbatch(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    assert main(["submit", f"--config={CONFIG}", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "submitted").exists()


@pytest.mark.usefixtures("no_sbatch")
def test_an_unknown_key_is_refused_by_the_parser_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["submit", f"--config={CONFIG}", "--model.no_such_key=1"])
    assert stopped.value.code == 2
    assert "no_such_key" in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists()


@pytest.mark.usefixtures("no_sbatch")
def test_the_text_for_sbatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition=gpu", "--time=1-12", "--min-nodes=2", "--sbatch=reservation=r", "--setup=module load cuda"]
    options += [
        "--cpus-per-task=4",
        "--trainer.accumulate_grad_batches=3",
        "--sweep=rank=16,64",
        "--sweep=lr=1e-5,2e-5,4e-5",
    ]
    assert main(["submit", f"--config={CONFIG}", *options, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in (
        "--array=0-5%6",
        "--gpus-per-node=8",
        "--mincpus=32",
        "--nodes=2-4",
        "--partition=gpu",
        "--requeue",
        "--reservation=r",
        "--signal=USR2@300",
        "--time=2160",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --ntasks-per-node" not in script  # with a range of nodes srun alone knows
    assert " --ntasks-per-node=8 --cpus-per-task=4 " in next(line for line in script.split("\n") if "srun " in line)
    assert script.index("module load cuda") < script.index("srun ") < script.index("scontrol requeue")
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "runs").exists()  # nothing is written either


@pytest.mark.usefixtures("no_sbatch")
def test_configurations_that_are_composed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(CONFIG).parent
    files = [
        f"--config={folder / part}" for part in ("base/llama3-70b_32gpu.yaml", "method/pissa.yaml", "rank/64.yaml")
    ]
    assert main(["submit", *files, "--partition=gpu", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=llama3-70b_32gpu-pissa-64\n" in script
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --ntasks-per-node=8\n" in script


@given(
    days=st.none() | st.integers(0, 9), hours=st.integers(0, 23), minutes=st.integers(0, 59), seconds=st.integers(0, 59)
)
def test_times_are_slurms(days: int | None, hours: int, minutes: int, seconds: int) -> None:
    text = f"{hours:02d}:{minutes:02d}:{seconds:02d}" if days is None else f"{days}-{hours}:{minutes}:{seconds}"
    expected = timedelta(days=days or 0, hours=hours, minutes=minutes, seconds=seconds).total_seconds() / 60
    if expected <= 1:
        return
    options = SubmitOptions(config=("x",), time=text, grace=1)
    assert 0 <= options.minutes - expected < 1


@given(batches=st.integers(1, 512), nodes=st.integers(1, 16), devices=st.integers(1, 8))
def test_the_global_batch_stays_the_same(batches: int, nodes: int, devices: int) -> None:
    try:
        assert accumulated(batches=batches, nodes=nodes, devices=devices) * nodes * devices == batches
    except SubmitError:
        assert batches % (nodes * devices)


def test_a_sweep_is_a_grid_and_rank_keeps_its_scaling() -> None:
    points = SubmitOptions(config=("x",), sweep=("rank=16,64", "model.warmup_ratio=0,0.1")).points
    assert len(points) == 4
    adapter = "--trainer.strategy.init_args.adapter.init_args"
    assert point_overrides(points[1]) == [f"{adapter}.r=16", f"{adapter}.lora_alpha=16", "--model.warmup_ratio=0.1"]


def test_two_failures_at_one_step_stop_the_job(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path, "7")
    for _ in range(2):
        log.begin(nodes=["a"])
        log.progress(12)
        log.error(node="a", rank=3, error=RuntimeError("lost"))
        log = AttemptLog(tmp_path, "7")
    with pytest.raises(RepeatedFailureError, match="twice in a row after step 12 .* rank 3 on a .* RuntimeError: lost"):
        log.begin(nodes=["a"])
    assert (tmp_path / "7.stopped").exists()


@pytest.mark.parametrize("between", ["progress", "requeued", "a killed write"])
def test_other_failures_do_not(tmp_path: Path, between: str) -> None:
    for attempt in range(4):
        log = AttemptLog(tmp_path, "7")
        log.begin(nodes=["a"])
        log.progress(attempt if between == "progress" else 12)
        if between == "requeued" and attempt % 2:
            log.end("requeued")
        if between == "a killed write" and attempt == 1:
            log.end("requeued")
            with log.path.open("a") as file:
                file.write('{"event": "err')
            return AttemptLog(tmp_path, "7").begin(nodes=["b"])
    return None


def test_signals_are_remembered_and_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    signals = StopSignals()
    signals.arm()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request is Request.STOP
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request is Request.REQUEUE
    finally:
        signals.disarm()
    assert signals.request is Request.NONE
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_process_that_is_there_for_one_run_keeps_them_to_its_end() -> None:
    program = (
        "import os; from lowrank_dist.cluster.signals import SIGNALS as s; s.arm(keep=True); s.arm(); s.disarm(); {} "
    )
    program += "os.kill(os.getpid(), 12); os.kill(os.getpid(), 15); print(s.request.name)"
    for ended, request in (("", "REQUEUE"), ("s.ignore();", "NONE")):
        done = subprocess.run([sys.executable, "-c", program.format(ended)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == request


def test_a_job_that_has_finished_is_not_requeued(tmp_path: Path) -> None:
    """Whatever its processes end with: the batch script looks for the mark."""
    log = AttemptLog(tmp_path, "7")
    log.begin(nodes=["a"])
    log.end("requeued")
    assert not (tmp_path / "7.stopped").exists()
    assert not log.was_cancelled()
    log.begin(nodes=["a"])
    log.end("finished")
    assert (tmp_path / "7.stopped").exists()
    assert not log.was_cancelled()


def test_points_of_a_sweep_do_not_share_a_directory_of_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path)}}
    argv = [f"--config={CONFIG}", "--sweep=lr=1e-5,2e-5", f"--trainer.callbacks={json.dumps([part])}", "--dry-run"]
    assert main(["submit", *argv]) == 1
    assert f"every point would write its checkpoints to dirpath={tmp_path}" in capsys.readouterr().err


def test_lines_begin_with_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    stream: Any = PrefixedStream(sys.stdout, "[n 1] ")
    for text in ("one\ntw", "o\n", "\n", "three"):
        print(text, end="", file=stream)
    assert capsys.readouterr().out == "[n 1] one\n[n 1] two\n[n 1] \n[n 1] three"


def test_the_interface_of_a_route() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("::1") is None  # IPv4 only


def node(host: str, within: float | None, between: float | None) -> NodeHealth:
    return NodeHealth(host=host, ranks=8, free_bytes=1, within=within, between=between)


def test_slow_nodes_are_named_not_their_neighbours() -> None:
    # between[i] is of nodes i and i + 1: c is slow, so b-c and c-d are
    nodes = [node("a", 9, 5), node("b", 9, 1), node("c", 2, 1), node("d", 9, 5), node("e", 9, 5)]
    assert [line.split(":")[0] for line in slow_nodes(nodes)] == ["c", "c"]
    assert slow_nodes(nodes[:2]) == []  # two cannot be told apart


def test_arguments_keep_the_step_on_fewer_nodes() -> None:
    job = TrainingJob(config=("c.yaml", "d.yaml"), overrides=(), folder="f", batches=32, grace=60, timeout=1.5)
    allocation: Any = SimpleNamespace(ranks=16, nodes=2, on_slurm=True)
    arguments = job.arguments(allocation)
    assert "--trainer.accumulate_grad_batches=2" in arguments
    assert "--trainer.strategy.init_args.timeout=0:01:30" in arguments
    assert "--ckpt_path=last" in arguments
    assert arguments[:3] == ["fit", "--config=c.yaml", "--config=d.yaml"]
