"""AdaLoRA on the ranks of a test, and the same training with stock PEFT in one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor

from helpers.training import BATCHES, LR, CausalLM, loader, make_strategy, make_trainer, tokens
from helpers.tuners import SEED, decoded
from lowrank_dist import NF4

#: Steps of a run, as many as there are batches.
TOTAL = BATCHES
Kept = dict[str, tuple[bool, ...]]


def config(**options: Any) -> AdaLoraConfig:
    """For the tiny LLaMA: the budget falls from 36 triplets at step 1 to 18 at step 6."""
    defaults: dict[str, Any] = {
        "init_r": 6,
        "target_r": 3,
        "lora_alpha": 400,  # so that few steps change what the model computes
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "total_step": TOTAL,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
        "task_type": "CAUSAL_LM",  # without it, PEFT adds no penalty
    }
    return AdaLoraConfig(**{**defaults, **options})


class Allocated(CausalLM):
    """Remembers the triplets that every step has kept; saves at steps."""

    def __init__(self, pretrained: Path, saves: dict[int, Path]) -> None:
        super().__init__(pretrained)
        self.saves, self.kept = saves, list[Kept]()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        trainer = self.trainer
        mine = tokens(TOTAL)[trainer.global_step].unflatten(0, (trainer.world_size, -1))[trainer.global_rank]
        parts = trainer.accumulate_grad_batches
        return super().training_step([mine.unflatten(0, (parts, -1))[index % parts]], index)

    def on_train_batch_end(self, *_: Any) -> None:
        steps = self.trainer.global_step
        if len(self.kept) < steps and not self.trainer.fit_loop._should_accumulate():
            self.kept += [self.trainer.strategy.saver.writer.allocation.kept]
            if steps in self.saves:
                self.trainer.save_checkpoint(self.saves[steps])


def train_sharded(
    pretrained: Path,
    options: dict[str, Any],
    quantization: NF4 | None = None,
    *,
    saves: dict[int, Path] | None = None,
    resume: tuple[int, Path] | None = None,
    precision: str = "32-true",
    strategy_options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> tuple[list[float], list[Kept]]:
    """Losses of all batches, and the triplets that are kept after every step, on the ranks of the test."""
    warnings.filterwarnings("ignore", module="peft")
    torch.manual_seed(SEED)
    more = {"quantization": quantization, **(strategy_options or {})}
    strategy = make_strategy(pretrained, adapter=config(**options), init=None, **more)
    module = Allocated(pretrained, saves or {})
    trainer = make_trainer(strategy, steps=TOTAL, precision=precision, **trainer_options)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = loader(rank, size, TOTAL, trainer.accumulate_grad_batches)
    if resume is not None:
        module.kept = [{}] * resume[0]
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume[1]))
    return module.losses, module.kept


def train_stock(
    pretrained: Path, options: dict[str, Any], quantization: NF4 | None = None, *, clip: float | None = None
) -> tuple[list[float], list[Kept], PeftModel]:
    """The same with PEFT alone: the global batch at once, `update_and_allocate` after every step."""
    model = decoded(pretrained, quantization, "adalora").requires_grad_(False).train()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = get_peft_model(model, config(**options))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    losses, kept = [], []
    for step, ids in enumerate(tokens(TOTAL)):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        losses.append(loss.item())
        pattern = model.peft_config["default"].rank_pattern or {}
        kept.append({name.removesuffix(".lora_E.default"): tuple(keeps) for name, keeps in pattern.items()})
    return losses, kept, model
