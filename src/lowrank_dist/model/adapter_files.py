"""The protocol of adapter files: which parameters of a model they hold, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class AdapterFiles(Protocol):
    """What adapter files hold of a model's parameters.

    `lowrank_dist.model.factor_layout.FactorLayout` is one for adapters that are made from the weights, and
    `lowrank_dist.tuners.files.PeftFiles` for those that PEFT makes.
    """

    @property
    def derived(self) -> tuple[str, ...]:
        """Names in the file of tensors that are not parameters."""

    @property
    def is_lora(self) -> bool:
        """Whether the adapter is a LoRA, to which ``lora/`` of a checkpoint is converted."""

    def stored_as(self, name: str) -> str | None:
        """Name in the file of the parameter `name` of the model; None if the file does not hold the parameter."""

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the adapter file by their names in it, from whole parameters by name in the model; on meta too."""
