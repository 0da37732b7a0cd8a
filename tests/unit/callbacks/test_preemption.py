"""What the preemption callback refuses, and what it warns of."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lowrank_dist import AdapterCheckpoint, Preemption

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "x",
    "SLURM_NTASKS": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def set_up(monkeypatch: pytest.MonkeyPatch, checkpoint: L.Callback | None, **environment: Any) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    callback = Preemption()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=SLURMEnvironment(**environment) if environment else None,
        callbacks=[callback, *([] if checkpoint is None else [checkpoint])],
        enable_checkpointing=checkpoint is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    callback.setup(trainer, L.LightningModule(), "fit")


@pytest.mark.parametrize("environment", [{}, {"auto_requeue": True}], ids=["found by Lightning", "given"])
def test_requeueing_twice_is_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="would both requeue the job"):
        set_up(monkeypatch, AdapterCheckpoint(), **environment)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(None, "add one to the callbacks"), (AdapterCheckpoint(save_weights_only=True), "saves nothing to resume from")],
)
def test_something_must_be_saved(monkeypatch: pytest.MonkeyPatch, checkpoint: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        set_up(monkeypatch, checkpoint, auto_requeue=False)


@pytest.mark.parametrize(("grace", "warnings"), [(9.0, 1), (12.0, 0)])
def test_a_grace_period_too_short_for_a_step_and_a_save_is_warned_of_once(
    grace: float, warnings: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    checkpoint, module = AdapterCheckpoint(), L.LightningModule()
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[checkpoint], is_global_zero=True, fit_loop=loop, global_step=0)
    callback = Preemption(grace_seconds=grace)

    def step(seconds: float) -> None:
        callback.on_train_batch_start(trainer, module, None, 0)
        clock[0] += seconds
        callback.on_train_batch_end(trainer, module, None, None, 0)

    with caplog.at_level(logging.WARNING):
        step(3.0)  # nothing was saved yet
        assert caplog.text == ""
        checkpoint.save_seconds = 7.0
        step(1.0)
        step(2.0)
    assert caplog.text.count("a step took 3.0 s and a save 7.0 s") == warnings
