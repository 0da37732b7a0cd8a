"""An initialisation of your own in a run: factors of Gaussian noise, and the residual that makes up for them.

python examples/tiny.py && python examples/own_method.py
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import torch
from peft import LoraConfig

from lowrank_dist import CausalLMModule, PiSSAStrategy, SFTDataModule
from lowrank_dist.linalg import seed_from_name
from lowrank_dist.methods import Decomposition, Matrix, Method, layer_shape, register, sharded, subtracted
from lowrank_dist.quantization import ResidualFormat

BASE, TRAIN = "runs/examples/llama", "runs/examples/chat.jsonl"


@register("noise")
@dataclass(frozen=True, kw_only=True)
class Noise(Method):
    scale: float = 0.01

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        inputs, outputs = layer_shape(matrix)
        # by the weight's name, so that all ranks draw the same
        generator = torch.Generator().manual_seed(seed_from_name(matrix.name))
        a = self.scale * torch.randn(matrix.rank, inputs, generator=generator)
        b = self.scale * torch.randn(outputs, matrix.rank, generator=generator)
        return subtracted(matrix, sharded(matrix, a, b), residual)


if __name__ == "__main__":
    strategy = PiSSAStrategy(BASE, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"), Noise(scale=0.02))
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=2, logger=False)
    trainer.fit(CausalLMModule(BASE, lr=1e-3), SFTDataModule(BASE, TRAIN, max_length=128, batch_size=2))
