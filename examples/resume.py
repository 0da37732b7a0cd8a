"""Go on after an interruption, on another number of ranks: the same command, again.

python examples/tiny.py
STOP_AT=2 python examples/resume.py             # as if preempted after step 2
DEVICES=1 python examples/resume.py             # goes on to step 4 on one rank, with the same global batch
"""

from __future__ import annotations

import os

import lightning as L
from peft import LoraConfig

from lowrank_dist import NF4, AdapterCheckpoint, CausalLMModule, PiSSA, PiSSAStrategy, SFTDataModule

BASE, TRAIN, OUTPUT = "runs/examples/llama", "runs/examples/chat.jsonl", "runs/examples/resume"
GLOBAL_BATCH, BATCH = 8, 2

if __name__ == "__main__":
    devices = int(os.environ.get("DEVICES", "2"))
    strategy = PiSSAStrategy(
        BASE, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"), PiSSA(), NF4()
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        accumulate_grad_batches=GLOBAL_BATCH // (BATCH * devices),  # so that a step stays what it was
        max_steps=int(os.environ.get("STOP_AT", "4")),
        logger=False,
        callbacks=AdapterCheckpoint(OUTPUT, filename="{step}", every_n_train_steps=1, save_top_k=-1),
    )
    # the schedule of a run depends on its number of steps, which STOP_AT shortens here: constant
    module = CausalLMModule(BASE, lr=1e-3, scheduler="constant", warmup_ratio=0)
    trainer.fit(module, SFTDataModule(BASE, TRAIN, max_length=128, batch_size=BATCH), ckpt_path="last")
    trainer.print(f"trained to step {trainer.global_step}")
