"""The adapter file of AdaLoRA: the triplets that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_dist.tuners.files import PeftFiles

#: Dimension of the triplets in PEFT's factors: Q, Lambda, P.
TRIPLETS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


def layer_and_factor(name: str) -> tuple[str, str]:
    """Layer and factor of a parameter such as ``"...q_proj.lora_A.default"``; for others the second is none of ours."""
    layer, _, rest = name.rpartition(".lora_")
    return layer, "lora_" + rest.partition(".")[0]


def is_factor(name: str) -> bool:
    """Whether a parameter is Q, Lambda or P of a layer."""
    return layer_and_factor(name)[1] in TRIPLETS


@dataclass(frozen=True, kw_only=True)
class AdaLoraFiles:
    """What `PeftFiles` says, with the factors cut to the triplets that are kept, as PEFT saves and loads them.

    Pruned triplets are trained on, so checkpoints hold whole factors too, where the optimizer's state is: for this
    `stored_as` knows no factor.

    Attributes
    ----------
    whole
        The files without a cut.
    kept
        Whether each triplet is kept, by layer. Empty: all are.
    """

    whole: PeftFiles
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    @property
    def derived(self) -> tuple[str, ...]:
        return self.whole.derived

    @property
    def is_lora(self) -> bool:
        return False

    def stored_as(self, name: str) -> str | None:
        return None if is_factor(name) else self.whole.stored_as(name)

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.whole.adapter({name: self._cut(name, tensor) for name, tensor in parameters.items()})

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        layer, factor = layer_and_factor(name)
        if factor not in TRIPLETS or layer not in self.kept:
            return tensor
        kept = [index for index, keeps in enumerate(self.kept[layer]) if keeps]
        return tensor.index_select(TRIPLETS[factor], torch.tensor(kept, dtype=torch.long, device=tensor.device))
