"""Evaluation without training: stages that have no training data, through the Trainer and through the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.command import lowrank_dist
from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer, tokens
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.training.module import CausalLMModule

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m_qpissa_2cpu.yaml"
PLAIN = {"quantization": None}


def stock_loss(material: Path) -> float:
    """Mean loss over all trained tokens of the set, by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32)
    data = SFTDataModule(str(material / "model"), "unused", str(material / "data.jsonl"))
    data.setup("validate")
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        number = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * number
        count += number
    return total / count


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize(("command", "role"), [("validate", "validation"), ("test", "test")])
def test_the_command_line_evaluates(material: Path, tmp_path: Path, command: str, role: str, ranks: int | None) -> None:
    options = {
        "--config": CONFIG,
        "--model.pretrained": material / "model",
        "--trainer.strategy.init_args.pretrained": material / "model",
        "--trainer.strategy.init_args.adapter.init_args.r": 4,
        "--trainer.strategy.init_args.quantization": "null",
        "--trainer.strategy.init_args.init.init_args.quantization_iterations": 1,
        "--data.tokenizer": material / "model",
        "--data.train": tmp_path / "none.jsonl",  # is not looked at
        f"--data.{role}": material / "data.jsonl",
        "--trainer.default_root_dir": tmp_path,
        "--trainer.logger.init_args.save_dir": tmp_path,
        "--trainer.devices": ranks or 1,
        "--trainer.precision": "32-true",
    }
    done = lowrank_dist(command, *(f"{key}={value}" for key, value in options.items()), ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    name = {"validate": "val_loss", "test": "test_loss"}[command]
    (printed,) = re.findall(rf"{name}\W+([\d.]+)", done.stdout)
    assert float(printed) == pytest.approx(stock_loss(material), rel=1e-5)


def evaluate_sft(material: Path) -> list[float]:
    model, data = str(material / "model"), str(material / "data.jsonl")
    found = []
    for stage in ("validate", "test"):
        trainer = make_trainer(make_strategy(model, **PLAIN))
        module, loaders = CausalLMModule(model), SFTDataModule(model, data, data, data, batch_size=2)
        (result,) = getattr(trainer, stage)(module, loaders, verbose=False)
        found += result.values()
        assert trainer.strategy.deepspeed_engine.train_micro_batch_size_per_gpu() == 1
    return found


def test_data_modules_that_are_set_up_for_their_stage_only(material: Path) -> None:
    assert run_ranks(2, evaluate_sft, material)[0] == pytest.approx([stock_loss(material)] * 2, rel=1e-5)


class Predicting(CausalLM):
    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.model(input_ids=batch[0], use_cache=False).logits


class NoTraining(L.LightningDataModule):
    """Has no `train_dataloader`."""

    def val_dataloader(self) -> DataLoader:
        return loader(self.trainer.global_rank, self.trainer.world_size, 1)

    test_dataloader = predict_dataloader = val_dataloader


class TrainingFails(NoTraining):
    def train_dataloader(self) -> DataLoader:
        raise KeyError("train")


def run_stage(pretrained: Path, stage: str, how: type[L.LightningDataModule] | None) -> Any:
    trainer = make_trainer(make_strategy(pretrained, **PLAIN))
    if how is None:
        data: dict[str, Any] = {"dataloaders": loader(trainer.global_rank, trainer.world_size, 1)}
    else:
        data = {"datamodule": how()}
    if stage == "predict":
        return trainer.predict(Predicting(pretrained), **data)[0]
    return getattr(trainer, stage)(Predicting(pretrained), **data, verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("how", [NoTraining, TrainingFails, None])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_stage_but_fit_asks_for_training_data(llama: Path, stage: str, how: Any) -> None:
    (ids,) = tokens(1)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(input_ids=ids, labels=ids)
    (found,) = run_ranks(1, run_stage, llama, stage, how)
    if stage == "predict":
        torch.testing.assert_close(found, stock.logits, rtol=1e-5, atol=1e-5)
    else:
        assert found == pytest.approx(stock.loss.item(), rel=1e-5)


class Batches(torch.utils.data.Dataset[list[Tensor]]):
    """Gives whole batches."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, step: int) -> list[Tensor]:
        return [tokens()[step]]


def fit_whole_batches(pretrained: Path) -> tuple[list[float], int]:
    module, trainer = CausalLM(pretrained), make_trainer(make_strategy(pretrained, **PLAIN), steps=2)
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    return module.losses, trainer.strategy.deepspeed_engine.train_micro_batch_size_per_gpu()


def fit_examples(pretrained: Path) -> tuple[list[float], int]:
    module, trainer = CausalLM(pretrained), make_trainer(make_strategy(pretrained, **PLAIN), steps=2)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 2))
    return module.losses, trainer.strategy.deepspeed_engine.train_micro_batch_size_per_gpu()


def test_loaders_without_a_batch_size_are_trained_on(llama: Path) -> None:
    losses, size = run_ranks(1, fit_whole_batches, llama)[0]
    assert size == 1
    assert (losses, 12) == run_ranks(1, fit_examples, llama)[0]
