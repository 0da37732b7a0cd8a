"""Fine-tune on conversations: QPiSSA, the loss on the assistant's turns only, several examples in a row.

python examples/tiny.py && python examples/chat.py
"""

from __future__ import annotations

import lightning as L
from peft import LoraConfig

from lowrank_dist import NF4, AdapterCheckpoint, CausalLMModule, PiSSA, PiSSAStrategy, SFTDataModule

BASE, TRAIN, OUTPUT = "runs/examples/llama", "runs/examples/chat.jsonl", "runs/examples/chat"

if __name__ == "__main__":
    strategy = PiSSAStrategy(
        BASE,
        LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        PiSSA(quantization_iterations=2),
        NF4(double_quant=True),
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=4,
        logger=False,
        callbacks=AdapterCheckpoint(OUTPUT, filename="{step}", every_n_train_steps=4),
    )
    data = SFTDataModule(BASE, TRAIN, max_length=256, batch_size=2, packing=True)
    trainer.fit(CausalLMModule(BASE, lr=1e-3), data)
