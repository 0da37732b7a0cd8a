"""On CUDA devices: the same losses, really paged optimizers, the memory budget. One process per device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from helpers.training import STEPS, CausalLM, dense_state, loader, make_strategy, train_plainly

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]


def fit(pretrained: Path, accelerator: str, precision: Any, **options: Any) -> tuple[list[float], Any]:
    module = CausalLM(pretrained)
    trainer = L.Trainer(
        strategy=make_strategy(pretrained, **options),
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(0, 1))
    return module.losses, trainer


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-true", 2e-2), ("bf16-mixed", 2e-2)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_equal_those_of_one_plain_process(
    llama: Path, precision: str, tolerance: float, gradient_checkpointing: bool
) -> None:
    """fp32 on a GPU may use other kernels and orders; bf16 has 8 bits. The reference is fp32 on the CPU."""
    losses, trainer = fit(llama, "gpu", precision, gradient_checkpointing=gradient_checkpointing)
    state = {name: t.float().cpu() for name, t in dense_state(trainer.strategy).items()}
    assert losses == pytest.approx(train_plainly(llama, state), rel=tolerance)


def test_the_walk_gives_the_bytes_of_the_cpu(llama: Path) -> None:
    """Factors agree to rounding; what the residual loses, matrix by matrix, agrees to a per mille."""
    reports = [fit(llama, accelerator, "32-true")[1].strategy.init_report for accelerator in ("gpu", "cpu")]
    for ours, theirs in zip(reports[0].matrices, reports[1].matrices, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
