"""QPiSSA on a mixture of experts: the stacked experts are decomposed one by one, and stay sharded in NF4.

python examples/tiny.py && python examples/experts.py
"""

from __future__ import annotations

import lightning as L
from peft import LoraConfig

from lowrank_dist import NF4, AdapterCheckpoint, CausalLMModule, PiSSA, PiSSAStrategy, SFTDataModule

BASE, TRAIN, OUTPUT = "runs/examples/mixtral", "runs/examples/chat.jsonl", "runs/examples/experts"

if __name__ == "__main__":
    adapter = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],  # of attention
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    trainer = L.Trainer(
        strategy=PiSSAStrategy(BASE, adapter, PiSSA(quantization_iterations=2), NF4()),
        accelerator="cpu",
        devices=2,
        max_steps=2,
        logger=False,
        callbacks=AdapterCheckpoint(OUTPUT, filename="{step}", every_n_train_steps=2),
    )
    trainer.fit(CausalLMModule(BASE, lr=1e-3), SFTDataModule(BASE, TRAIN, max_length=128, batch_size=2))
