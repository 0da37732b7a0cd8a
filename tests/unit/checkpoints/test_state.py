"""Names in a state from a file: only those that the object has are set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

from lowrank_dist.checkpoints.state import check_loops, check_schedules, restore_engine
from lowrank_dist.errors import CheckpointError


class Factor:
    """As a user writes one: its attributes are part of the state of the schedule."""

    slope = 0.1

    def __init__(self) -> None:
        self.history = {"seen": 0}

    def __call__(self, step: int) -> float:
        return 1 / (1 + self.slope * step)


def schedules() -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    warmup, decay = LinearLR(optimizer, 0.1, total_iters=2), LambdaLR(optimizer, Factor())
    return [SequentialLR(optimizer, [warmup, decay], milestones=[2]).state_dict()]


def test_schedules() -> None:
    found = schedules()
    lambdas = found[0]["_schedulers"][1]["lr_lambdas"]
    lambdas[0]["history"]["more"] = 1  # data, whatever its names are
    check_schedules(found, schedules())
    for where, name in ((lambdas[0], "__class__"), (found[0]["_schedulers"][0], "step"), (found[0], "optimizer")):
        where[name] = 1
        with pytest.raises(CheckpointError, match=rf"lr_schedulers\[0\].* has no {name!r} here"):
            check_schedules(found, schedules())
        del where[name]
    lambdas[0] = {"slope": 1.0}  # where a plain function is used now
    own = schedules()
    own[0]["_schedulers"][1]["lr_lambdas"] = [None]
    with pytest.raises(CheckpointError, match="'slope'"):
        check_schedules(found, own)


def test_loops() -> None:
    own = {"fit_loop": {"epoch_progress": {"current": {"ready": 1}}, "epoch_loop.state_dict": {}}}
    check_loops({"fit_loop": {"epoch_progress": {"current": {"ready": 2}}, "epoch_loop.state_dict": {"any": 1}}}, own)
    with pytest.raises(CheckpointError, match="loops.fit_loop.epoch_progress.current has no 'reset' here"):
        check_loops({"fit_loop": {"epoch_progress": {"current": {"reset": 2}}}}, own)


def test_counters_of_the_engine() -> None:
    engine = SimpleNamespace(global_steps=0, global_samples=0, skipped_steps=0, optimizer="kept")
    counters: dict[str, Any] = {"global_steps": 3, "global_samples": 12, "skipped_steps": 1, "optimizer": "forged"}
    restore_engine(counters, engine)
    assert vars(engine) == {"global_steps": 3, "global_samples": 12, "skipped_steps": 1, "optimizer": "kept"}
    for wrong in (None, "3", -1):
        with pytest.raises(CheckpointError, match="global_steps=.* is no number of steps"):
            restore_engine({**counters, "global_steps": wrong}, engine)
