"""A LightningModule and a DataLoader of your own: nothing of this package but the strategy.

python examples/tiny.py && python examples/plain_module.py
"""

from __future__ import annotations

import lightning as L
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_dist import PiSSA, PiSSAStrategy

BASE = "runs/examples/llama"


class Module(L.LightningModule):
    def configure_model(self) -> None:  # on the meta device: the strategy brings the weights
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (ids,) = batch
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


if __name__ == "__main__":
    strategy = PiSSAStrategy(BASE, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"), PiSSA())
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=4, logger=False)
    ids = torch.randint(256, (32, 24), generator=torch.Generator().manual_seed(0))
    trainer.fit(Module(), DataLoader(TensorDataset(ids), batch_size=4))
