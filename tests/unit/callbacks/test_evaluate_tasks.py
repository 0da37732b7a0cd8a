"""What `EvaluateTasks` refuses."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from lowrank_dist import EvaluateTasks, InputError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": "gsm8k_pissa"}, "must be a list"),
        ({"tasks": []}, "name at least one"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": -1}, "limit=-1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        EvaluateTasks(**{"tasks": ["responses"], "every_n_steps": 1, **options})


def test_other_strategies_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(InputError, match="needs PiSSAStrategy, not SingleDeviceStrategy"):
        EvaluateTasks(["responses"], every_n_steps=1).setup(trainer, L.LightningModule(), "fit")
