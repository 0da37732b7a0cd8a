"""Compare ranks and learning rates, and choose: one short run each, the loss on held-out data decides.

    python examples/tiny.py && python examples/sweep.py

``lowrank-dist submit --sweep rank=8,16 --sweep lr=1e-4,1e-3`` makes jobs of the same, on a cluster or on one machine,
and ``lowrank-dist compare`` a table of them.
"""

from __future__ import annotations

import itertools

import lightning as L
from peft import LoraConfig

from lowrank_dist import CausalLMModule, PiSSA, PiSSAStrategy, SFTDataModule

BASE, TRAIN = "runs/examples/llama", "runs/examples/chat.jsonl"


def held_out_loss(rank: int, lr: float) -> float:
    """The loss after a short run."""
    strategy = PiSSAStrategy(
        BASE, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"), PiSSA(), show_progress=False
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        limit_train_batches=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SFTDataModule(BASE, TRAIN, validation=TRAIN, max_length=128, batch_size=2, eval_limit=16)
    trainer.fit(CausalLMModule(BASE, lr=lr), data)  # a new strategy, Trainer and module for every run
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    losses = {(rank, lr): held_out_loss(rank, lr) for rank, lr in itertools.product((4, 8), (1e-3,))}
    for (rank, lr), loss in sorted(losses.items(), key=lambda item: item[1]):
        print(f"rank {rank}, learning rate {lr:g}: {loss:.4f}")
