"""Stacked experts as PEFT has them."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn


def peft_delta(a: Tensor, b: Tensor, experts: int) -> Tensor:
    """What stock PEFT adds to a stack of weights, ``[experts, out, in]``.

    A is ``[experts * r, in]``, B ``[out, r * experts]``; the scaling is 1.
    """
    base, rank = nn.Module(), a.shape[0] // experts
    base.stack = nn.Parameter(torch.zeros(experts, b.shape[0], a.shape[1]))
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["stack"])
    layer = ParamWrapper(base, "default", "stack", config, r=rank, lora_alpha=rank)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
    return layer.get_delta_weight("default").detach()
