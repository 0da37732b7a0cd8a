"""What a job is refused for before it is submitted, and the text for sbatch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from lowrank_dist.cli import main

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


BY_TIME = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"train_time_interval": "0:10:00"}}
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
    "pattern": (["--data.train=[no/such/part-*.jsonl]"], "data.train=no/such/part-*.jsonl: "),
    "model": (["--trainer.strategy.init_args.pretrained=/no/such"], "pretrained=/no/such: /no/such does not exist"),
    "no checkpoints": (["--trainer.callbacks=[]"], "has no lowrank_dist.AdapterCheckpoint"),
    "auto_requeue": (
        ["--trainer.plugins=lightning.pytorch.plugins.environments.SLURMEnvironment"],
        "a SLURMEnvironment with auto_requeue on",
    ),
    "source": (['--data.train=[{"path": "/no/such.jsonl", "weight": 2.0}]'], "data.train=/no/such.jsonl: "),
    "checkpoint": (["--config={one}"], "ckpt_path is runs/x, but a job resumes from its own newest checkpoint"),
    "local": (["--cluster=local"], "--cluster local is one machine, but trainer.num_nodes is 4"),
    "local alone": (["--cluster=local", "--partition=x"], "--partition has no effect with --cluster local"),
    "memory": (["--cluster=local", "--mem-gb=4"], "--mem-gb has no effect with --cluster local"),
    "no memory": (["--mem-gb=nan"], "--mem-gb nan must be positive"),
    "no array": (["--array-parallelism=2"], "--array-parallelism 2 has no effect without --sweep"),
    "no timeout": (
        ["--trainer.strategy.init_args.timeout=0:05:00", "--collective-timeout=10"],
        "--collective-timeout 10.0 has no effect: the strategy takes no timeout, or the configuration sets it",
    ),
    "by time": (
        [f"--trainer.callbacks={json.dumps([BY_TIME])}", "--seconds-per-step=2"],
        "--seconds-per-step 2.0 has no effect: lowrank_dist.AdapterCheckpoint saves by time or by epoch",
    ),
    "followed": (["--dry-run", "--follow"], "--follow has no effect with --dry-run"),
    "cluster": (["--cluster=pbs"], "--cluster pbs: unknown; choose one of slurm, local"),
    "sweep": (["--sweep=rank"], "--sweep rank: write KEY=VALUE,VALUE"),
    "accelerator": (["--trainer.accelerator=auto"], "the nodes may differ from this machine"),
    "unknown option": (["--partiton=x"], "--partiton is neither an option of submit"),
}


@pytest.mark.usefixtures("no_sbatch")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_before_sbatch(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    (tmp_path / "one.yaml").write_text("ckpt_path: runs/x\n")
    options = [option.replace("{one}", str(tmp_path / "one.yaml")) for option in options]
    assert main(["submit", f"--config={CONFIG}", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "submitted").exists()


SBATCH = {
    "refuses": (
        "echo 'sbatch: error: invalid partition specified: x' >&2; echo 'sbatch: error: failed' >&2; exit 1",
        "sbatch refuses the job: sbatch: error: invalid partition specified: x; sbatch: error: failed; nothing was",
    ),
    "says nothing": ("exit 3", "sbatch refuses the job: Command"),
    "says what nobody understands": ("echo Hello", "sbatch has not said whether it has taken the job (Could not make"),
}


@pytest.mark.usefixtures("no_sbatch")
@pytest.mark.parametrize("case", SBATCH)
def test_what_sbatch_refuses_leaves_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, message = SBATCH[case]
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{program}\n")
    root = tmp_path / "new" / "runs"
    argv = ["submit", f"--config={CONFIG}", f"--trainer.default_root_dir={root}", "--sweep=lr=1e-4,1e-5"]
    assert main(argv) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"lowrank-dist submit: {message}")
    assert all(line.startswith("warning: ") for line in warnings)
    assert (tmp_path / "new").exists() == (case == "says what nobody understands")


@pytest.mark.usefixtures("no_sbatch")
def test_what_was_there_before_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tmp_path / "runs" / "jobs" / "earlier"
    before.mkdir(parents=True)
    argv = ["submit", f"--config={CONFIG}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    assert main(argv) == 1
    assert [path.name for path in before.parent.iterdir()] == ["earlier"]


@pytest.mark.usefixtures("no_sbatch")
def test_a_directory_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", f"--config={CONFIG}", "--trainer.default_root_dir=/proc/runs"]) == 1
    assert "trainer.default_root_dir='/proc/runs': nothing can be written there" in capsys.readouterr().err


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


def test_configurations_that_are_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed where there is no SLURM, which refuses to submit them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = Path(CONFIG).parent
    files = [
        f"--config={folder / part}" for part in ("base/llama3-70b_32gpu.yaml", "method/pissa.yaml", "rank/64.yaml")
    ]
    assert main(["submit", *files, "--partition=gpu", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=llama3-70b_32gpu-pissa-64\n" in script
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --ntasks-per-node=8\n" in script
    assert main(["submit", *files, "--partition=gpu"]) == 1
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_sbatch")
def test_one_callback_need_not_be_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one source of data with settings of its own."""
    train = tmp_path / "train.jsonl"
    train.touch()
    one = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"every_n_train_steps": 2}}
    config = {"trainer": {"callbacks": one}, "data": {"train": [{"path": str(train), "weight": 2.0}]}}
    (tmp_path / "one.yaml").write_text(json.dumps(config))
    argv = [f"--config={CONFIG}", f"--config={tmp_path / 'one.yaml'}", "--data.validation=null"]
    assert main(["submit", *argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash")
    assert main(["submit", *argv, "--time=1:00:00", "--seconds-per-step=1800", "--dry-run"]) == 1
    assert "a checkpoint every 1:00:00 and --time 1:00:00" in capsys.readouterr().err


def test_points_of_a_sweep_do_not_share_a_directory_of_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path)}}
    argv = [f"--config={CONFIG}", "--sweep=lr=1e-5,2e-5", f"--trainer.callbacks={json.dumps([part])}", "--dry-run"]
    assert main(["submit", *argv]) == 1
    assert f"every point would write to AdapterCheckpoint.dirpath={tmp_path}" in capsys.readouterr().err
