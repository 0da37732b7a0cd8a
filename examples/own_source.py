"""Weights that are no files: any object that returns rows of named tensors. Here, those of a file are halved.

python examples/tiny.py && python examples/own_source.py
"""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from peft import LoraConfig
from torch import Tensor

from lowrank_dist import CausalLMModule, PiSSA, PiSSAStrategy, SFTDataModule
from lowrank_dist.storage import CheckpointReader, TensorInfo

BASE, TRAIN = "runs/examples/llama", "runs/examples/chat.jsonl"


class Halved:
    """The weights of a model, times one half. Every rank asks for its own rows, from a thread."""

    def __init__(self, directory: str) -> None:
        self.reader = CheckpointReader(directory)
        self.name = f"half of {directory}"
        self.fingerprint = f"0.5 {directory}"  # equal for equal weights: a run resumes with the same only
        self.tensors: Mapping[str, TensorInfo] = {name: self.reader.info(name) for name in self.reader}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.reader.rows(name, start, stop) / 2


if __name__ == "__main__":
    strategy = PiSSAStrategy(Halved(BASE), LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"), PiSSA())
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=2, logger=False)
    trainer.fit(CausalLMModule(BASE, lr=1e-3), SFTDataModule(BASE, TRAIN, max_length=128, batch_size=2))
