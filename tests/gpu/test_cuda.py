"""On a CUDA device, in a process of its own: the losses, the walk and offloading against the CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import training
from helpers.ranks import run_ranks
from lowrank_dist import StepMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]


def fit(pretrained: Path, accelerator: str, precision: str, **options: Any) -> tuple[list[float], Any, Any]:
    """Losses, weights before training (fp32, CPU) and the walk's report of a fit on one device."""
    return run_ranks(1, fit_here, pretrained, accelerator, precision, options, cuda=accelerator == "gpu")[0]


def fit_here(
    pretrained: Path, accelerator: str, precision: str, options: dict[str, Any]
) -> tuple[list[float], Any, Any]:
    module, trainer = training.fit(pretrained, accelerator=accelerator, precision=precision, **options)
    state = {name: t.float().cpu() for name, t in training.dense_state(trainer.strategy).items()}
    for stage in (trainer.validate, trainer.test):  # after a fit, whose end moves the module to the CPU
        stage(module, training.loader(0, 1, 1), verbose=False)
    return module.losses, state, trainer.strategy.init_report


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-true", 2e-2), ("bf16-mixed", 2e-2)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_equal_those_of_one_plain_process(
    llama: Path, precision: str, tolerance: float, gradient_checkpointing: bool
) -> None:
    """fp32 on a GPU may use other kernels and orders; bf16 has 8 bits. The reference is fp32 on the CPU."""
    losses, state, _ = fit(llama, "gpu", precision, gradient_checkpointing=gradient_checkpointing)
    assert losses == pytest.approx(training.train_plainly(llama, state), rel=tolerance)


def test_the_walk_gives_the_bytes_of_the_cpu(llama: Path) -> None:
    """Factors agree to rounding; what the residual loses, matrix by matrix, agrees to a per mille."""
    reports = [fit(llama, accelerator, "32-true")[2] for accelerator in ("gpu", "cpu")]
    for ours, theirs in zip(reports[0].matrices, reports[1].matrices, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)


@pytest.mark.parametrize("offload", [{"offload_optimizer": True}, {"offload_parameters": True}], ids=str)
def test_offloading_changes_no_loss(llama: Path, offload: dict[str, bool]) -> None:
    """Partitions or optimizer states in host memory: the same arithmetic, fp32 rounding of other kernels aside."""
    plain, _, _ = fit(llama, "gpu", "32-true")
    offloaded, _, _ = fit(llama, "gpu", "32-true", **offload)
    assert offloaded == pytest.approx(plain, rel=1e-4)


CUT = 3


def run_part(pretrained: Path, output: Path, accelerator: str, steps: int, resume: bool) -> list[float]:
    """Losses up to `steps`, from the start or from what an earlier part left; what it leaves is for the next."""
    module = training.ByStep(pretrained)
    strategy = training.make_strategy(pretrained, init_cache=output / "cache")
    trainer = training.make_trainer(strategy, accelerator=accelerator, steps=steps)
    trainer.fit(module, training.loader(0, 1), ckpt_path=output / "cut" if resume else None)
    if not resume:
        trainer.save_checkpoint(output / "cut")
    return module.losses


def moved(pretrained: Path, output: Path, first: str, then: str) -> list[float]:
    """Losses of a run that begins on one accelerator and ends on another."""
    before = run_ranks(1, run_part, pretrained, output, first, CUT, False, cuda=first == "gpu")[0]
    return before + run_ranks(1, run_part, pretrained, output, then, training.STEPS, True, cuda=then == "gpu")[0]


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_run_moves_between_devices(llama: Path, tmp_path: Path, first: str, then: str) -> None:
    """With `init_cache` the residual is the first run's, whatever the second device would round to."""
    undisturbed = run_ranks(1, run_part, llama, tmp_path / "whole", "cpu", training.STEPS, False, cuda=False)[0]
    assert moved(llama, tmp_path, first, then) == pytest.approx(undisturbed, rel=1e-3)


def monitored(pretrained: Path, directory: Path) -> tuple[dict[str, float], list[float]]:
    monitor = StepMonitor(every_n_steps=4, profile_steps=2)
    module, _ = training.fit(
        pretrained, accelerator="gpu", precision="bf16-true", callbacks=[monitor], default_root_dir=directory
    )
    return monitor.metrics, module.losses


def test_the_step_monitor_reads_the_device(llama: Path, tmp_path: Path) -> None:
    """Parts between events add up to the step, the peaks of memory are there, and the trace has kernels."""
    ((metrics, losses),) = run_ranks(1, monitored, llama, tmp_path)
    found = {name.removeprefix("throughput/"): value for name, value in metrics.items()}
    parts = {name: value for name, value in found.items() if name.startswith("seconds_") and name != "seconds_per_step"}
    assert sum(parts.values()) == pytest.approx(found["seconds_per_step"])
    assert min(parts["seconds_compute"], parts["seconds_optimizer"]) > 0
    assert 0 < found["memory_allocated_gb"] <= found["memory_reserved_gb"]
    assert found["gemm_share"] > 0
    assert losses == pytest.approx(fit(llama, "gpu", "bf16-true")[0], rel=1e-3)
    with gzip.open(tmp_path / "trace-rank0.json.gz") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in kinds
