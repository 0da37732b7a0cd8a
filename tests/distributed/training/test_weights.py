"""Weights of messages: the loss of a step is the weighted mean over its tokens, however they are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.sft import save_material
from helpers.training import make_strategy
from lowrank_dist import CausalLMModule, InputError, SFTDataModule


def talk(first: float, second: float, words: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "world" + " one" * words, "weight": first},
            {"role": "user", "content": "2 and 2?"},
            {"role": "assistant", "content": "four" + " two" * words, "weight": second},
        ]
    }


TALKS = [talk(0.5, 1, 1), talk(0, 0.25, 5), talk(1, 2, 3), talk(0.1, 0.1, 2)]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_material(tmp_path_factory.mktemp("weights"), TALKS)


class Plain(L.LightningModule):
    """A module of a user, which knows no weights."""

    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    validation_step = training_step

    def configure_optimizers(self) -> None: ...


def fit(material: Path, accumulate: int, packing: bool) -> tuple[list[float], float]:
    """Losses of two steps over all of it; the validation loss before."""
    size, model, file = torch.distributed.get_world_size(), str(material / "model"), str(material / "data.jsonl")
    losses: list[float] = []

    class Module(CausalLMModule):
        def on_train_batch_end(self, *_: Any) -> None:
            if not self.trainer.fit_loop._should_accumulate():
                losses.append(float(self.trainer.callback_metrics["train_loss"]))

    trainer = L.Trainer(
        strategy=make_strategy(material / "model", quantization=None),
        accelerator="cpu",
        devices=size,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=-1,
        limit_val_batches=1.0,
    )
    data = SFTDataModule(
        model, file, validation=file, batch_size=4 // size // accumulate, packing=packing, max_length=128
    )
    module = Module(model, lr=1e-2, scheduler="constant", warmup_ratio=0.0)
    before: list[float] = []
    module.on_validation_end = lambda: before.append(float(trainer.callback_metrics["val_loss"]))  # type: ignore[method-assign]
    trainer.fit(module, data)
    return losses, before[0]


def expected(material: Path) -> float:
    """By stock transformers, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32)
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), max_length=128)
    data.setup("fit")
    total = weight = 0.0
    for batch in data.train_dataloader():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        losses = functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none", ignore_index=-100)
        weights = batch["weights"][0, 1:] * (batch["labels"][0, 1:] != -100)
        total, weight = total + float((losses * weights).sum()), weight + float(weights.sum())
    return total / weight


def test_the_mean_is_weighted(material: Path) -> None:
    """2e-5: fp32 of a base that is summed from residual and factors."""
    value = expected(material)
    (one, before), *_ = run_ranks(1, fit, material, 1, False)
    assert before == pytest.approx(value, rel=2e-5)
    assert one[0] == pytest.approx(value, rel=2e-5)
    for ranks, accumulate in ((1, 4), (2, 2)):
        for found, at_first in run_ranks(ranks, fit, material, accumulate, False):
            assert found == pytest.approx(one, rel=1e-4)
            assert at_first == pytest.approx(value, rel=2e-5)
    (packed, _), *_ = run_ranks(1, fit, material, 1, True)
    assert packed == pytest.approx(one, rel=1e-4)


def test_a_module_that_takes_none_is_refused(material: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"))
    with pytest.raises(InputError, match="Plain takes no weights.*takes_weights = True"):
        trainer.fit(Plain(), data)
