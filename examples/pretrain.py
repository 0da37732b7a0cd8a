"""Go on with pretraining on plain text: every token is trained, blocks of one length, embeddings and norms as well.

python examples/tiny.py && python examples/pretrain.py
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lowrank_dist import CausalLMModule, PiSSA, PiSSAStrategy

BASE, TEXT, LENGTH = "runs/examples/llama", "runs/examples/text.txt", 32

if __name__ == "__main__":
    tokens = AutoTokenizer.from_pretrained(BASE)(Path(TEXT).read_text())["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in blocks]
    strategy = PiSSAStrategy(
        BASE,
        LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        PiSSA(),
        train_also=["*norm*", "model.embed_tokens.weight"],
    )
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=4, logger=False)
    trainer.fit(CausalLMModule(BASE, lr=1e-3, embedding_lr=1e-4), DataLoader(examples, batch_size=4))
