"""Residual formats beside NF4 in a fit: losses of stock PEFT on the decoded weights, caches, resumes, exact plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from helpers.ranks import run_ranks
from helpers.training import ByStep, dense_state, fit, loader, make_strategy, make_trainer, train_plainly
from lowrank_dist import FP4, FP8, INT8, MXFP4, LoftQ, LoRA, PiSSA
from lowrank_dist.callbacks import AdapterCheckpoint
from lowrank_dist.forecast.job import ModelShapes, RunSpec, parameters

FORMATS = [FP4(double_quant=True), INT8(), FP8(), MXFP4()]
METHODS = {1: LoRA(), 2: PiSSA(quantization_iterations=2), 3: LoftQ(quantization_iterations=2)}
STEPS = 3


def trained(pretrained: Path, work: Path, fmt: Any, method: Any) -> dict[str, Any]:
    """Losses, weights at step 0 and resident bytes; losses from a cache; those after a resume without it."""
    options: dict[str, Any] = {"quantization": fmt, "init": method, "ranks_per_matrix": 1}
    module, trainer = fit(pretrained, steps=STEPS, **options)
    strategy = trainer.strategy
    found = {"losses": module.losses, "state": dense_state(strategy)}
    found["held"] = strategy.init_report.residual_bytes_per_rank
    save = AdapterCheckpoint(work, every_n_train_steps=STEPS - 1, save_top_k=-1, filename="{step}")
    options_of_trainer: dict[str, Any] = {"callbacks": [save], "enable_checkpointing": True}
    cached, _ = fit(pretrained, steps=STEPS, init_cache=work / "cache", **options, **options_of_trainer)
    (checkpoint,) = work.glob(f"step={STEPS - 1}*")
    resumed, trainer = ByStep(pretrained), make_trainer(make_strategy(pretrained, **options), steps=STEPS)
    trainer.fit(resumed, loader(trainer.global_rank, trainer.world_size, STEPS), ckpt_path=str(checkpoint))
    return found | {"cached": cached.losses, "resumed": resumed.losses}


def every(pretrained: Path, work: Path, method: Any) -> list[dict[str, Any]]:
    return [trained(pretrained, work / str(fmt), fmt, method) for fmt in FORMATS]


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.matrix), 2, pytest.param(3, marks=pytest.mark.matrix)]
)
def test_losses_are_those_of_peft_on_the_decoded_weights(llama: Path, tmp_path: Path, ranks: int) -> None:
    """To the rounding of sums, and with them the gradients, which the losses of later steps depend on.

    One rank trains from zero, two alternate as QPiSSA, three as LoftQ.
    """
    results = run_ranks(ranks, every, llama, tmp_path, METHODS[ranks])[0]
    shapes = ModelShapes.of(llama, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), init=METHODS[ranks])
    for fmt, found in zip(FORMATS, results, strict=True):
        expected = train_plainly(llama, found["state"])[:STEPS]
        assert found["losses"] == pytest.approx(expected, rel=2e-5), fmt
        assert found["cached"] == pytest.approx(found["losses"], rel=1e-6)
        assert found["resumed"] == pytest.approx(found["losses"][STEPS - 1 :], rel=1e-6)
        job = RunSpec(nodes=1, gpus_per_node=ranks, compute_dtype=torch.float32, residual=fmt, init=METHODS[ranks])
        planned = sum(p.shard_bytes for p in parameters(shapes, job) if p.kind in ("codes", "maxima"))
        assert planned == found["held"]
