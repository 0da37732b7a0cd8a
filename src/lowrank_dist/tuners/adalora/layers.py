"""PEFT's layers of AdaLoRA."""

from __future__ import annotations

from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from lowrank_dist.model.names import ADAPTER


def adalora_layers(model: nn.Module) -> list[AdaLoraLayer]:
    """The layers of `model` with an AdaLoRA adapter."""
    return [m for m in model.modules() if isinstance(m, AdaLoraLayer) and ADAPTER in m.lora_A]


def freeze_divisors(model: nn.Module) -> None:
    """Freeze ``ranknum``, by which a layer divides its update, in place.

    PEFT 0.21 means to, but makes a new parameter, which is trained, where it moves the adapter to another device or
    dtype; the value would be lost, since it is not saved.
    """
    for layer in adalora_layers(model):
        layer.ranknum[ADAPTER].requires_grad_(False)
