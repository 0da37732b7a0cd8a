"""Seconds of training beside the losses: validations, what lies between fits, and earlier attempts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_dist import LossHistory


def test_seconds_are_those_of_training_over_all_attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(
        global_step=0, callback_metrics={}, fit_loop=loop, state=state, sanity_checking=True, is_global_zero=True
    )
    trainer.log_dir, module = str(tmp_path), L.LightningModule()

    def validated(callback: LossHistory, seconds: float) -> None:
        callback.on_validation_start(trainer, module)
        clock[0] += seconds
        trainer.callback_metrics = {"val_loss": 1.0}
        callback.on_validation_end(trainer, module)

    def trained(callback: LossHistory, seconds: float) -> None:
        trainer.global_step += 1
        clock[0] += seconds
        trainer.callback_metrics = {"train_loss": 1.0}
        callback.on_train_batch_end(trainer, module, None, None, 0)

    first = LossHistory("history.json")
    validated(first, 50.0)
    clock[0] += 5.0
    trainer.sanity_checking = False
    first.on_train_start(trainer, module)
    trained(first, 2.0)
    validated(first, 50.0)
    trained(first, 3.0)
    first.on_train_end(trainer, module)
    clock[0] += 500.0
    trainer.state.fn = TrainerFn.VALIDATING
    validated(first, 50.0)
    clock[0] += 500.0
    assert [entry["seconds"] for entry in first.history["train"]] == [2.0, 5.0]
    assert [entry["seconds"] for entry in first.history["validation"]] == [0.0, 2.0, 5.0]

    again = LossHistory("history.json")
    again.load_state_dict(first.state_dict())
    trainer.state.fn = TrainerFn.FITTING
    again.on_train_start(trainer, module)
    trained(again, 4.0)
    assert again.history["train"][-1] == {"step": 3, "loss": 1.0, "seconds": 9.0}
