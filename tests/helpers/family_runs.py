"""Three steps of a family of models on the ranks of a test, and the same steps by stock transformers and PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig

from helpers.families import Batch, Family
from helpers.training import make_strategy, make_trainer
from lowrank_dist import NF4, AdapterCheckpoint, LoRA, PiSSA

STEPS, LR = 3, 2e-3


@dataclass(frozen=True)
class Run:
    """What a rank saw."""

    first: Tensor
    losses: list[float]
    last: Tensor
    matrices: int


class FamilyModule(L.LightningModule):
    """The model of a checkpoint, its loss, AdamW; keeps the answers to the validation batches."""

    def __init__(self, pretrained: Path, auto_class: Any) -> None:
        super().__init__()
        self.pretrained, self.auto_class, self.model = pretrained, auto_class, None
        self.losses: list[float] = []
        self.answers: list[Tensor] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.auto_class.from_config(AutoConfig.from_pretrained(self.pretrained))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.model(**batch).loss
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        self.losses.append(float(mean) / self.trainer.world_size)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self.answers.append(answer(self.model(**batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=LR)


def answer(output: Any) -> Tensor:
    """What a model says, without its loss."""
    if getattr(output, "logits", None) is not None:
        return output.logits.detach().float()
    return next(value for name, value in output.items() if name != "loss" and isinstance(value, Tensor)).detach()


def adapter_of(family: Family) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **copy.deepcopy(dict(family.adapter))}
    )


def share(batch: Batch, rank: int, size: int) -> Batch:
    """A rank's part of a global batch."""
    return {name: value.chunk(size)[rank] if isinstance(value, Tensor) else value for name, value in batch.items()}


def train(
    pretrained: Path, family: Family, output: Path, quantization: NF4 | None, precision: str, options: dict[str, Any]
) -> Run:
    """On one rank: the answer at step 0, the losses of three steps, the answer after them, and a checkpoint."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = family.batches(AutoConfig.from_pretrained(pretrained), STEPS)
    init = PiSSA() if quantization is None else LoRA()
    strategy = make_strategy(pretrained, adapter=adapter_of(family), quantization=quantization, init=init, **options)
    saves = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=STEPS)
    trainer = make_trainer(
        strategy, precision=precision, steps=STEPS, callbacks=[saves], enable_checkpointing=True, num_sanity_val_steps=1
    )
    module = FamilyModule(pretrained, family.auto_class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module,
            DataLoader([share(batch, rank, size) for batch in batches], batch_size=None),
            DataLoader(batches[:1], batch_size=None),
        )
    first, last = module.answers[0], module.answers[-1]
    assert strategy.init_report is not None
    return Run(first=first, losses=module.losses, last=last, matrices=len(strategy.init_report.matrices))


# -- stock libraries, one process --


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def original(pretrained: Path, family: Family) -> Any:
    with quiet():
        return family.auto_class.from_pretrained(pretrained, dtype=torch.float32).eval()


def encoded(weight: Tensor) -> Tensor:
    """A matrix through bitsandbytes' NF4."""
    flat = weight.detach().reshape(-1)
    padded = nn.functional.pad(flat, (0, -flat.numel() % 64))
    packed, state = bnb.quantize_4bit(padded, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)[: flat.numel()].view(weight.shape)


def stock_peft(pretrained: Path, family: Family, initial: Path, quantization: NF4 | None) -> Any:
    """Stock PEFT at the start of the run: the saved A and B, and the residual, which is formed here."""
    with quiet():
        # with the layers that all-linear left out
        config = LoraConfig.from_pretrained(initial)
        config.inference_mode = False
        model = get_peft_model(original(pretrained, family), config)
    factors = load_file(initial / "adapter_model.safetensors")
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_name = {plain(name): parameter for name, parameter in wanted.items()}
    copies = {plain(name) for name in wanted if ".modules_to_save." in name}  # which start as the checkpoint's
    assert set(factors) | copies == set(by_name), sorted(set(factors) ^ set(by_name))[:4]
    with torch.no_grad():
        for name, value in factors.items():
            by_name[name].copy_(value)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                name = getattr(layer, "parameter_name", "weight")
                weight = getattr(layer.get_base_layer(), name)
                weight.sub_(layer.get_delta_weight("default"))
                if quantization is not None:
                    weight.copy_(encoded(weight))
    return model


def plain(name: str) -> str:
    """PEFT's name in adapter files."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def train_stock(model: Any, batches: list[Batch]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def reloaded(pretrained: Path, family: Family, directory: Path, quantization: NF4 | None, batch: Batch) -> Tensor:
    """The answer of stock PEFT with the adapter in `directory` on the original model, or on its encoded weights."""
    model = original(pretrained, family)
    with quiet():
        model = PeftModel.from_pretrained(model, directory)
    if quantization is not None:
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
                weight.copy_(encoded(weight))
    return answer(model.eval()(**batch))


def compare(
    pretrained: Path, family: Family, output: Path, quantization: NF4 | None, runs: list[Run]
) -> dict[str, float]:
    """How far a run is from stock libraries: relative differences of step 0, of losses, of the LoRA that was saved."""
    batches = family.batches(AutoConfig.from_pretrained(pretrained), STEPS)
    checkpoint = output / f"step={STEPS}"
    assert runs[0].matrices > 0
    stock = stock_peft(pretrained, family, checkpoint / "adapter_init", quantization)
    with torch.no_grad():
        before = original(pretrained, family) if quantization is None else stock.eval()
        first = answer(before(**batches[0]))
    expected = train_stock(stock, batches)
    last = reloaded(pretrained, family, checkpoint / "lora", quantization, batches[0])
    return {
        "step 0": max(apart(run.first, first) for run in runs),
        "losses": max(abs(a - b) / abs(b) for run in runs for a, b in zip(run.losses, expected, strict=True)),
        "lora": max(apart(run.last, last) for run in runs),
        "learned": apart(runs[0].last, first),
    }


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert one.shape == other.shape, (one.shape, other.shape)
    finite = torch.isfinite(other)
    assert torch.equal(finite, torch.isfinite(one))
    return float((one - other)[finite].abs().max() / other[finite].abs().max())
