"""What a job ends with after an error of one rank: started again if it may pass, stopped for good if it may not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from helpers.command import run_main
from helpers.faults import failing_disk_at
from lowrank_dist.slurm.job import STOPPED, main

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m_qpissa_2cpu.yaml"


def _task(argv: list[str]) -> int:
    """A task whose disk fails, on the second rank, in files with ``DISK_FAILS_AT`` in their path."""
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1" and (path := os.environ.get("DISK_FAILS_AT")):
        failing_disk_at(path, errno.EIO)
    main(argv)
    return 0


@pytest.mark.parametrize("what", ["a disk that fails for a while", "no such model", "a bad record"])
def test_only_bad_input_stops_a_job_for_good(material: Path, tmp_path: Path, what: str) -> None:
    passing = what.startswith("a disk")
    model = tmp_path / "none" if what == "no such model" else material / "model"
    data = material / "data.jsonl"
    if what == "a bad record":
        data = tmp_path / "bad.jsonl"
        data.write_text((material / "data.jsonl").read_text() + '{"prompt": 1}\n')
    strategy = "--trainer.strategy.init_args"
    arguments = [
        *(f"--config={CONFIG}", f"--folder={tmp_path}", "--batches=2"),
        f"--model.pretrained={model}",
        f"{strategy}.pretrained={model}",
        f"{strategy}.adapter.init_args.r=4",
        f"--data.tokenizer={material / 'model'}",
        f"--data.train={data}",
        "--data.validation=null",
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.max_steps=2",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
    ]
    common = {"SUBMITIT_LOCAL_JOB_ID": str(os.getpid()), "SUBMITIT_LOCAL_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    if passing:
        common["DISK_FAILS_AT"] = "adapter"
    ranks = run_main(_task, arguments, [common | {"SUBMITIT_LOCAL_GLOBALID": str(rank)} for rank in range(2)])
    assert [rank.returncode for rank in ranks] == [1 if passing else STOPPED] * 2, ranks[0].stderr[-3000:]
    assert list(tmp_path.glob("*.stopped")) == ([] if passing else [tmp_path / f"{os.getpid()}.stopped"])
    events = map(json.loads, (tmp_path / f"{os.getpid()}_attempts.jsonl").read_text().splitlines())
    errors = {event["rank"]: event["error"] for event in events if event["event"] == "error"}
    if what == "a bad record":
        assert f"{data}:25: " in ranks[0].stderr
        assert "matrices:" not in ranks[0].stdout + ranks[0].stderr  # before the walk
    if passing:
        assert "FutureWarning" not in ranks[0].stderr + ranks[1].stderr
        assert errors[1].startswith("OSError: [Errno 5]")
        assert errors[0].startswith("RemoteError: rank 1: OSError: [Errno 5]")
        assert "rank 1: OSError" in ranks[0].stderr
        assert "in pwrite" in ranks[0].stderr  # the traceback of rank 1
