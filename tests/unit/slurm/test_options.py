"""Options of a job: times as SLURM writes them, sweeps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.slurm import SubmitOptions
from lowrank_dist.slurm.options import SubmitError, point_overrides


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


def test_a_sweep_is_a_grid_and_rank_keeps_its_scaling() -> None:
    points = SubmitOptions(config=("x",), sweep=("rank=16,64", "model.warmup_ratio=0,0.1")).points
    assert len(points) == 4
    adapter = "--trainer.strategy.init_args.adapter.init_args"
    assert point_overrides(points[1]) == [f"{adapter}.r=16", f"{adapter}.lora_alpha=16", "--model.warmup_ratio=0.1"]
    assert point_overrides({"config": "a.yaml", "seed": "3"}) == ["--seed_everything=3"]  # a file comes before


def test_one_machine_runs_one_job_at_a_time() -> None:
    assert SubmitOptions(config=("x",)).parallelism == 8
    assert SubmitOptions(config=("x",), cluster="local").parallelism == 1
    assert SubmitOptions(config=("x",), cluster="local", array_parallelism=2, sweep=("lr=1,2",)).parallelism == 2


@pytest.mark.parametrize(
    "options",
    [
        {"name": "job\n#SBATCH --uid=0"},
        {"partition": "gpu\nrm -rf ~"},
        {"config": ("a\x1b[2Jb.yaml",)},
        {"overrides": ("--model.lr=1\r--trainer.devices=1",)},
        {"sbatch": ("comment=a\u2028b",)},
        {"sweep": ("lr=1e-4,\x00",)},
        {"setup": ("module load a\nmodule load b",)},
    ],
)
def test_control_characters_are_refused(options: dict[str, Any]) -> None:
    """A newline would become a line of the script."""
    with pytest.raises(SubmitError, match=f"--{next(iter(options))} .*: has the control character") as caught:
        SubmitOptions(**{"config": ("x",), **options})
    assert str(caught.value).isprintable()
