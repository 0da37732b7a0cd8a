"""Classify sequences with an encoder: PiSSA on BERT's linear layers, the new head trained whole.

python examples/tiny.py && python examples/classify.py
"""

from __future__ import annotations

import lightning as L
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from lowrank_dist import AdapterCheckpoint, PiSSA, PiSSAStrategy

BASE, OUTPUT = "runs/examples/bert", "runs/examples/classify"


class Classifier(L.LightningModule):
    def configure_model(self) -> None:
        self.model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(BASE))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        loss: Tensor = self.model(input_ids=ids, labels=labels).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


if __name__ == "__main__":
    adapter = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],  # no pretrained weights decide what it is to say
        task_type="SEQ_CLS",
    )
    trainer = L.Trainer(
        strategy=PiSSAStrategy(BASE, adapter, PiSSA()),
        accelerator="cpu",
        devices=2,
        max_steps=4,
        logger=False,
        callbacks=AdapterCheckpoint(OUTPUT, filename="{step}", every_n_train_steps=4),
    )
    ids = torch.randint(256, (32, 24), generator=torch.Generator().manual_seed(0))
    trainer.fit(Classifier(), DataLoader(TensorDataset(ids, (ids[:, 0] > 127).long()), batch_size=4))
