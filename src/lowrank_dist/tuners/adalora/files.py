"""The adapter files of AdaLoRA: the triplets that are kept, and a LoRA with the same update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor
from torch.nn import functional as F

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


def scaling_of(config: AdaLoraConfig) -> float:
    """By what PEFT's layers multiply ``P Lambda Q``, whatever the ranks that they keep."""
    alpha = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)
    return alpha / (config.init_r + 1e-5)


def lora_config(config: AdaLoraConfig, rank: int) -> LoraConfig:
    """The configuration of `AdaLoraFiles.lora`."""
    same = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
    same |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return LoraConfig(**same)


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
    scaling
        By what PEFT multiplies ``P Lambda Q``.
    """

    whole: PeftFiles
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    scaling: float = 1.0

    @property
    def derived(self) -> tuple[str, ...]:
        return self.whole.derived

    @property
    def is_lora(self) -> bool:
        return False

    @property
    def lora_rank(self) -> int | None:
        """Rank of `lora`, the largest that a layer keeps. None: that of the factors."""
        return max((sum(keeps) for keeps in self.kept.values()), default=None)

    def stored_as(self, name: str) -> str | None:
        return None if is_factor(name) else self.whole.stored_as(name)

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.whole.adapter({name: self._cut(name, tensor) for name, tensor in parameters.items()})

    def lora(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a LoRA with the same update, from the whole parameters of layers; on meta too.

        A is Q and B is ``scaling P Lambda``, so that its own scaling is 1. All layers have one rank, because servers
        know no other LoRAs; triplets that others keep are zeros.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            layer, factor = layer_and_factor(name)
            if factor == "lora_A":
                a, rank = self._cut(name, tensor), self.lora_rank or len(tensor)
                found[f"{self.whole.keys[name]}.weight"] = F.pad(a, (0, 0, 0, rank - len(a)))
            elif factor == "lora_B":
                of_lambda = name.replace(f"{layer}.lora_B", f"{layer}.lora_E")
                b, values = self._cut(name, tensor), self._cut(of_lambda, parameters[of_lambda])
                b = (b.float() * values.float().mT * self.scaling).to(tensor.dtype)
                rank = self.lora_rank or tensor.shape[1]
                found[f"{self.whole.keys[name]}.weight"] = F.pad(b, (0, rank - b.shape[1]))
            elif factor not in TRIPLETS:
                found |= self.whole.adapter({name: tensor})
        return found

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        layer, factor = layer_and_factor(name)
        if factor not in TRIPLETS or layer not in self.kept:
            return tensor
        kept = [index for index, keeps in enumerate(self.kept[layer]) if keeps]
        return tensor.index_select(TRIPLETS[factor], torch.tensor(kept, dtype=torch.long, device=tensor.device))
