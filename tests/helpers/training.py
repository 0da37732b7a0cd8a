"""A small LightningModule as a user would write it, its data, and a run of it on the ranks of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_dist import NF4, PiSSA, PiSSAStrategy
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.zero3.partition import gathered

GLOBAL_BATCH = 12  # divisible by 1, 2, 3 and 4 ranks
STEPS = 5
#: Global batches that there are, for runs of more steps.
BATCHES = 8
LR = 2e-3
#: Of DeepSpeed, where no strategy makes one.
DEEPSPEED_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def tokens(steps: int = STEPS, length: int = 16) -> Tensor:
    """Token ids of every step's global batch, ``[steps, 12, length]``."""
    return torch.randint(3, 256, (BATCHES, GLOBAL_BATCH, length), generator=torch.Generator().manual_seed(7))[:steps]


class CausalLM(L.LightningModule):
    """The model of a checkpoint, its loss, AdamW."""

    def __init__(self, pretrained: Path, auto_class: Any = AutoModelForCausalLM) -> None:
        super().__init__()
        self.pretrained, self.auto_class, self.model = pretrained, auto_class, None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.auto_class.from_config(AutoConfig.from_pretrained(self.pretrained))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        self.losses.append(float(mean) / self.trainer.world_size)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        (ids,) = batch
        self.log("val_loss", self.model(input_ids=ids, labels=ids, use_cache=False).loss, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=LR)


class ByStep(CausalLM):
    """Its batch is that of the step, whatever the loader gives: a resumed run needs no other loader.

    Rank 0 writes ``step loss`` lines to `record`, which outlive the process.
    """

    def __init__(self, pretrained: Path, record: Path | None = None) -> None:
        super().__init__(pretrained)
        self.record = record

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        step, trainer = self.trainer.global_step, self.trainer
        mine = tokens(BATCHES)[step % BATCHES].unflatten(0, (trainer.world_size, -1))[trainer.global_rank]
        loss = super().training_step([mine.to(self.device)], index)
        if self.record is not None and trainer.is_global_zero:
            with self.record.open("a") as file:
                file.write(f"{step} {self.losses[-1]!r}\n")
        return loss


def recorded(record: Path) -> dict[int, float]:
    """Losses by step that `ByStep` has written; of steps done twice the last."""
    lines = [line.split() for line in record.read_text().splitlines()]
    return {int(step): float(loss) for step, loss in lines}


def loader(rank: int, world_size: int, steps: int = STEPS, micro_batches: int = 1, first: int = 0) -> DataLoader:
    """This rank's part of every global batch, in `micro_batches` parts, beginning with batch `first`."""
    mine = tokens(steps).roll(-first, dims=0).unflatten(1, (world_size, -1))[:, rank]
    size = mine.shape[1] // micro_batches
    return DataLoader(TensorDataset(mine.flatten(0, 1)), batch_size=size)


def make_strategy(pretrained: Path, **options: Any) -> PiSSAStrategy:
    """QPiSSA of rank 4 on all linear layers, unless `options` say otherwise."""
    defaults: dict[str, Any] = {
        "adapter": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", lora_dropout=0.0),
        "init": PiSSA(),
        "quantization": NF4(),
        "show_progress": False,
        "shard_within": "world",
    }
    return PiSSAStrategy(pretrained, **{**defaults, **options})


def make_trainer(
    strategy: PiSSAStrategy, *, accelerator: str = "cpu", precision: Any = "32-true", steps: int = STEPS, **options: Any
) -> L.Trainer:
    """A quiet Trainer over the ranks of the test."""
    return L.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=options.pop("devices", None) or torch.distributed.get_world_size(),
        precision=precision,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        use_distributed_sampler=False,
        num_sanity_val_steps=options.pop("num_sanity_val_steps", 0),
        **options,
    )


def fit(pretrained: Path, *, precision: str = "32-true", steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
    """Fit; returns the module and the trainer."""
    trainer_options = {key: options.pop(key) for key in list(options) if key in _TRAINER_OPTIONS}
    module = CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **options), precision=precision, steps=steps, **trainer_options)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trainer.fit(module, loader(rank, size, steps, trainer_options.get("accumulate_grad_batches", 1)))
    return module, trainer


_TRAINER_OPTIONS = (
    "accelerator",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
)


def dense_state(strategy: PiSSAStrategy) -> dict[str, Tensor]:
    """All weights by PEFT's names, residuals decoded, factors as they were before training. Collective."""
    from lowrank_dist.layers.frozen import FrozenLinear

    strategy.deepspeed_engine.empty_partition_cache()
    backbone, state = strategy.lightning_module.model, {}
    frozen = {name: module for name, module in backbone.named_modules() if isinstance(module, FrozenLinear)}
    for name, module in frozen.items():
        with gathered(module.stored()):
            stored = tuple(p.detach().clone() for p in module.stored())
        state[f"{name}.weight"] = module.decode(stored, torch.float32)
    inside = {f"{name}.{stored}" for name, module in frozen.items() for stored in module.stored_names}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if name not in inside:
            with gathered([parameter]):
                state[name] = parameter.detach().clone()
    return state | initial_factors(strategy)


def initial_factors(strategy: PiSSAStrategy) -> dict[str, Tensor]:
    """A0 and B0 by the names of the parameters, whole, on every rank. Collective."""
    every = ShardGroup().gather_objects(strategy.saver.writer.initial)
    return {name: value for one in every for name, value in one.items()}


def train_plainly(pretrained: Path, state: dict[str, Tensor], clip: float | None = None) -> list[float]:
    """The same weights in stock transformers + PEFT, one process, AdamW, the global batch at once."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    losses = []
    for ids in tokens():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
