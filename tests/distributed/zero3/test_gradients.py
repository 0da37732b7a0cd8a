"""Gradients that an engine accumulates: scaled in the middle of a step, and gone after it."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from helpers.ranks import run_ranks
from helpers.training import DEEPSPEED_CONFIG
from lowrank_dist.zero3.gradients import clear_gradients, scale_gradients
from lowrank_dist.zero3.partition import use_cpu_accelerator

SHAPES = [(6, 5), (7,), (2,)]  # the last one is smaller than three ranks


class Weighted(nn.Module):
    """Its gradients are the weights that it is called with; a parameter without a weight is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in SHAPES)

    def forward(self, weights: list[Tensor]) -> Tensor:
        return torch.stack([(p * w).sum() for p, w in zip(self.held, weights, strict=False)]).sum()


def engine_of(zero: dict[str, Any]) -> Any:
    use_cpu_accelerator()
    module = Weighted()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": DEEPSPEED_CONFIG["zero_optimization"] | zero,
        "gradient_clipping": 0.0,  # else 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def whole_numbers(seed: int) -> list[Tensor]:
    """Divisible by all numbers of ranks: their mean over ranks is exact."""
    generator = torch.Generator().manual_seed(seed)
    return [6.0 * torch.randint(-4, 5, shape, generator=generator) for shape in SHAPES]


def accumulate(engine: Any, weights: list[Tensor], *, last: bool) -> None:
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(engine(weights))


def scale_between(zero: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two batches, the first one halved, and the parameters after the step."""
    engine = engine_of(zero)
    accumulate(engine, whole_numbers(0), last=False)
    engine.step()
    scale_gradients(engine.optimizer, torch.tensor(0.5, dtype=torch.float64))
    accumulate(engine, whole_numbers(1), last=True)
    gradients = [safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters()]
    engine.step()
    return gradients, [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("zero", [{}, {"sub_group_size": 20}, {"offload_optimizer": {"device": "cpu"}}], ids=str)
def test_what_is_accumulated_is_scaled(ranks: int, zero: dict[str, Any]) -> None:
    """Bit for bit: these numbers are exact in fp32."""
    for gradients, parameters in run_ranks(ranks, scale_between, zero):
        expected = [first / 2 + second for first, second in zip(whole_numbers(0), whole_numbers(1), strict=True)]
        assert all(torch.equal(found, one) for found, one in zip(gradients, expected, strict=True))
        assert all(torch.equal(found, -one) for found, one in zip(parameters, expected, strict=True))


def step_twice(clear: bool) -> list[Tensor]:
    """Parameters after a step in which all have gradients, and one in which only the first has."""
    engine = engine_of({})
    for weights in (whole_numbers(0), whole_numbers(1)[:1]):
        accumulate(engine, weights, last=True)
        engine.step()
        if clear:
            clear_gradients(engine.optimizer)
    return [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]


def test_no_gradient_is_left_from_the_step_before() -> None:
    """DeepSpeed steps an unused parameter by its last gradient again, which `clear_gradients` is for."""
    first, second = whole_numbers(0), whole_numbers(1)
    cleared, left = (run_ranks(2, step_twice, clear)[0] for clear in (True, False))
    assert torch.equal(cleared[0], -first[0] - second[0])
    for found, again, gradient in zip(cleared[1:], left[1:], first[1:], strict=True):
        assert torch.equal(found, -gradient)
        assert torch.equal(again, -2 * gradient)
