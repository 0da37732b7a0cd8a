"""What a job passes on to fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lowrank_dist.slurm import TrainingJob


def test_arguments_keep_the_step_on_fewer_nodes() -> None:
    job = TrainingJob(config=("c.yaml", "d.yaml"), overrides=(), folder="f", batches=32, grace=60, timeout=1.5)
    allocation: Any = SimpleNamespace(ranks=16, nodes=2, on_slurm=True)
    arguments = job.arguments(allocation)
    assert "--trainer.accumulate_grad_batches=2" in arguments
    assert "--trainer.strategy.init_args.timeout=0:01:30" in arguments
    assert "--ckpt_path=last" in arguments
    assert arguments[:3] == ["fit", "--config=c.yaml", "--config=d.yaml"]
