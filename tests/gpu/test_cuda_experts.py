"""Stacked experts on a CUDA device: torch's kernel for grouped products, no wait of the host, bounded memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.experts import IMPLEMENTATIONS, block, encoded, inputs, outcome, wrapped, wrappers
from lowrank_dist.layers.experts import bound_experts
from lowrank_dist.quantization.nf4 import NF4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]


def on_device(root: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the device that computes in `dtype`, with factors in `dtype`."""
    moved = copy.deepcopy(root).to("cuda")
    for layer in wrappers(moved):
        layer.compute_dtype = dtype
    for name, parameter in moved.named_parameters():
        if parameter.is_floating_point() and "weight_" not in name:
            parameter.data = parameter.data.to(dtype)
    return moved


def moved(args: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Any:
    x, ids, weights = args
    return x.to("cuda", dtype), ids.cuda(), weights.to("cuda", dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rank", [4, 8])  # of 8, rows begin at multiples of 16 bytes
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_stock_peft_on_the_cpu(
    architecture: str, implementation: str, dtype: torch.dtype, tolerance: float, rank: int
) -> None:
    """fp32 against fp32: tf32 may be on; bf16 has 8 bits."""
    experts, count = block(architecture, implementation)
    own, stock = encoded(wrapped(experts, rank=rank), NF4(double_quant=True))
    for used in (count, 2):
        args = inputs(count, used=used)
        expected = outcome(stock, args)
        device = on_device(own, dtype)
        for at_a_time in (1, 3, count):
            bound_experts(device, at_a_time)
            found = outcome(device, moved(args, dtype))
            for name, value in expected.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(found[name].float().cpu(), value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("at_a_time", [2, 6])
def test_the_host_does_not_wait_for_the_device(at_a_time: int) -> None:
    """Whatever would: of some experts at a time it waits for the copy of the numbers of rows, which is an event."""
    experts, count = block("qwen3_moe")
    own, _ = encoded(wrapped(experts, rank=8), NF4())
    device = on_device(own, torch.bfloat16)
    bound_experts(device, at_a_time)
    args = moved(inputs(count), torch.bfloat16)
    outcome(device, args)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(device, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_the_experts_decoded_at_a_time() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(16, 512, 1024) / 32)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ends = torch.arange(1, 17, dtype=torch.int32, device=x.device) * (len(x) // 16)
            return torch.nn.functional.grouped_mm(x, self.first.transpose(1, 2), offs=ends) * weights.sum()

    own, _ = encoded(wrapped(Wide(), rank=8), NF4())
    device = on_device(own, torch.bfloat16)
    args = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16), None, torch.ones(1, device="cuda").bfloat16()
    one, peaks = 512 * 1024 * 2, {}
    for at_a_time in (1, 2, 4, 16):
        bound_experts(device, at_a_time)
        outcome(device, args)  # type: ignore[arg-type]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(device, args)  # type: ignore[arg-type]
        peaks[at_a_time] = torch.cuda.max_memory_allocated() - before
    assert peaks[4] - peaks[2] == pytest.approx(2 * one, rel=0.5)
    assert peaks[16] - peaks[4] == pytest.approx(12 * one, rel=0.5)
