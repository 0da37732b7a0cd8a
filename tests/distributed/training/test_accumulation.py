"""Accumulated batches against stock Lightning in one process: which batch ends a step, and what the step does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.covering import covering
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import CausalLM, dense_state, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.zero3.optimizer import ShardedOptimizer

ENDLESS = 1000


class Counted(L.LightningModule):
    """Its log has, for every batch, the loss, the steps so far and the learning rate of the next one."""

    def __init__(self, pretrained: Path, optimizer: str = "SGD", state: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.pretrained, self.optimizer, self.state, self.model = pretrained, optimizer, state, None
        self.log_: list[tuple[float, int, float]] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.state is None:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.pretrained))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(self.pretrained, dtype=torch.float32)
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), self.model)
            assert not self.model.load_state_dict(self.state, strict=False).missing_keys
            self.model.train()

    def configure_optimizers(self) -> Any:
        make: Any = getattr(torch.optim, self.optimizer)
        lr = {"SGD": 1.0, "AdamW": 2e-3}[self.optimizer]  # SGD forgives no factor
        optimizer = make([p for p in self.parameters() if p.requires_grad], lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, _: int) -> Tensor:
        ids = batch[0] if isinstance(batch, list) else batch["input_ids"]
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.loss = float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean"))
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.model(input_ids=batch[0], use_cache=False)

    def on_train_batch_end(self, *_: Any) -> None:
        schedule: Any = self.lr_schedulers()
        self.log_.append((self.loss, self.trainer.global_step, schedule.get_last_lr()[0]))
        assert schedule.last_epoch == self.trainer.global_step
        engine = getattr(self.trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            assert engine.global_steps == self.trainer.global_step
            assert engine.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
            if self.optimizer == "AdamW":
                assert ShardedOptimizer(engine.optimizer).steps == self.trainer.global_step


def gradient_of_many(pretrained: Path, precision: str, batches: int) -> Tensor:
    """Of 64 rows, in so many batches; on one rank, before the step."""
    found: list[Tensor] = []

    class Keeps(CausalLM):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            found.append(self.trainer.strategy.deepspeed_engine.optimizer.grad_partitions_flat_buffer.clone())

    rows = torch.randint(3, 256, (64, 16), generator=torch.Generator().manual_seed(1))
    trainer = make_trainer(
        make_strategy(pretrained, quantization=None), steps=1, precision=precision, accumulate_grad_batches=batches
    )
    trainer.fit(Keeps(pretrained), DataLoader(TensorDataset(rows), batch_size=64 // batches))
    return found[0].float()


def test_sums_over_batches_are_in_fp32(llama: Path) -> None:
    """In bf16 the sum of 64 batches would be twice as far from the gradient in fp32 as that of one batch is."""
    exact, one, many = (
        run_ranks(1, gradient_of_many, llama, precision, batches)[0]
        for precision, batches in (("32-true", 1), ("bf16-true", 1), ("bf16-true", 64))
    )
    assert (many - exact).norm() < 1.1 * (one - exact).norm()


class Stream(IterableDataset):
    """Batches of a loader, without a length: only their end tells which one is the last."""

    def __init__(self, batches: DataLoader) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def streamed(batches: DataLoader, options: dict[str, Any]) -> DataLoader:
    return DataLoader(Stream(batches), batch_size=None) if options.pop("stream", False) else batches


def train(pretrained: Path, batches: int, options: dict[str, Any]) -> tuple[Any, ...]:
    module = Counted(pretrained, options.pop("optimizer", "SGD"))
    strategy = make_strategy(pretrained, quantization=None, **options.pop("strategy", {}))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = streamed(loader(rank, size, batches), options)
    trainer = make_trainer(strategy, **{"steps": -1, **options})
    trainer.fit(module, data, loader(rank, size, 1))
    assert strategy.deepspeed_engine.micro_steps == len(module.log_)
    after = strategy.lightning_module_state_dict()
    return module.log_, dense_state(strategy), {n.removeprefix("model."): w for n, w in after.items()}


def train_stock(pretrained: Path, state: dict[str, Tensor], batches: int, options: dict[str, Any]) -> tuple[Any, Any]:
    module = Counted(pretrained, options.pop("optimizer", "SGD"), state)
    options.pop("strategy", None)
    data = streamed(loader(0, 1, batches), options)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=options.pop("steps", -1), num_sanity_val_steps=0, **quiet, **options
    )
    trainer.fit(module, data, loader(0, 1, 1))
    return module.log_, dict(module.model.named_parameters())


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("batches", "steps", "options"),
    [
        (5, 9, {"accumulate_grad_batches": 2, "max_epochs": 3}),
        (5, 9, {"accumulate_grad_batches": 2, "max_epochs": 3, "optimizer": "AdamW"}),
        (5, 6, {"accumulate_grad_batches": 2, "max_epochs": 2, "gradient_clip_val": 0.02}),
        (2, 2, {"accumulate_grad_batches": 3, "steps": 2, "max_epochs": ENDLESS}),
        (5, 4, {"accumulate_grad_batches": 2, "steps": 4, "max_epochs": ENDLESS, "val_check_interval": 1}),
        (8, 4, {"accumulate_grad_batches": 4, "max_epochs": 2, "limit_train_batches": 5}),
        (4, 4, {"accumulate_grad_batches": 3, "max_epochs": 2, "strategy": {"use_reentrant": True}}),
        (4, 4, {"accumulate_grad_batches": 3, "max_epochs": 2, "strategy": {"offload_optimizer": True}}),
        (3, 6, {"accumulate_grad_batches": 1, "max_epochs": 2}),
        (5, 6, {"accumulate_grad_batches": 2, "max_epochs": 2, "stream": True}),
    ],
    ids=str,
)
def test_steps_are_those_of_stock_lightning(
    llama: Path, ranks: int, batches: int, steps: int, options: dict[str, Any]
) -> None:
    """fp32: only the order of sums differs."""
    log, state, weights = run_ranks(ranks, train, llama, batches, dict(options))[0]
    expected, stock = train_stock(llama, state, batches, dict(options))
    assert [step for _, step, _ in log] == [step for _, step, _ in expected]
    assert log[-1][1] == steps
    assert [loss for loss, *_ in log] == pytest.approx([loss for loss, *_ in expected], rel=1e-5)
    assert [lr for *_, lr in log] == pytest.approx([lr for *_, lr in expected], rel=1e-12)
    assert weights
    for name, weight in weights.items():
        assert not torch.equal(weight, state[name])
        torch.testing.assert_close(weight, stock[name].detach(), rtol=1e-4, atol=1e-6)


# -- resuming -------------------------------------------------------------------------------------------------------


class Failing(Counted):
    def __init__(self, pretrained: Path, fails_at: int | None) -> None:
        super().__init__(pretrained, "AdamW")
        self.fails_at = fails_at

    def training_step(self, batch: Any, index: int) -> Tensor:
        if len(self.log_) == self.fails_at:
            raise RuntimeError("the user's own error")
        return super().training_step(batch, index)


def tune(
    material: Path,
    output: Path,
    accumulated: int,
    batch_size: int,
    checkpoint: Path | None = None,
    fails_at: int | None = None,
) -> list[tuple[float, int, float]]:
    """Twenty examples an epoch, for two epochs, saved at every step."""
    model = str(material / "model")
    data = SFTDataModule(model, str(material / "data.jsonl"), batch_size=batch_size, limit=20)
    callbacks = [
        AdapterCheckpoint(output / "steps", "{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True),
        AdapterCheckpoint(output / "epochs", "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]
    module = Failing(material / "model", fails_at)
    trainer = make_trainer(
        make_strategy(model),
        steps=-1,
        max_epochs=2,
        callbacks=callbacks,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulated,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.log_


@pytest.fixture(scope="module")
def tuned(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, int, float]]]:
    """Five batches an epoch, two a step: steps of 2, 2 and 1 batches."""
    output = tmp_path_factory.mktemp("tuned")
    log = run_ranks(2, tune, material, output, 2, 2)[0]
    assert [step for _, step, _ in log] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    return output, log


def steps_of(log: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    """Mean loss of every step, its number, the learning rate after it."""
    ends = [0, *(i + 1 for i in range(len(log)) if i + 1 == len(log) or log[i][1] > (log[i - 1][1] if i else 0))]
    found = []
    for begin, end in pairwise(dict.fromkeys(ends)):
        losses = [loss for loss, *_ in log[begin:end]]
        found.append((sum(losses) / len(losses), *log[end - 1][1:]))
    return found


@covering(
    1,
    {
        ("checkpoint", "batches"): [
            ("steps/step=1", 2),
            ("steps/step=2", 4),
            ("steps/step=3", 5),
            ("epochs/step=3", 5),
            ("steps/step=5", 9),
        ],
        ("ranks", "accumulated", "batch_size"): [(2, 2, 2), (1, 2, 4), (1, 4, 2)],
    },
)
def test_resuming_at_any_step(
    material: Path,
    tuned: tuple[Path, list[tuple[float, int, float]]],
    tmp_path: Path,
    ranks: int,
    accumulated: int,
    batch_size: int,
    checkpoint: str,
    batches: int,
) -> None:
    """In an epoch, before and after its last step, with other ranks and batches of the same steps."""
    output, log = tuned
    rest = run_ranks(ranks, tune, material, tmp_path, accumulated, batch_size, output / checkpoint)[0]
    if accumulated == 2:
        assert [step for _, step, _ in rest] == [step for _, step, _ in log[batches:]]
    before = log[batches - 1][1]
    found, expected = steps_of([(0.0, before, 0.0), *rest])[1:], steps_of(log)[before:]
    assert [step for _, step, _ in found] == [step for _, step, _ in expected]
    assert [loss for loss, *_ in found] == pytest.approx([loss for loss, *_ in expected], rel=1e-4)
    assert [lr for *_, lr in found] == [lr for *_, lr in expected]


@pytest.mark.parametrize(("fails_at", "step"), [(3, 1), (4, 2), (9, 5)])
def test_an_exception_loses_no_batch(
    material: Path, tuned: tuple[Path, list[tuple[float, int, float]]], tmp_path: Path, fails_at: int, step: int
) -> None:
    """In the second batch of a step, and in the last batch of an epoch, which is a step of its own."""
    _, log = tuned
    for _, error in run_ranks_catching(2, tune, material, tmp_path, 2, 2, None, fails_at):
        assert "the user's own error" in str(error)
    rest = run_ranks(2, tune, material, tmp_path / "rest", 2, 2, tmp_path / "steps" / f"step={step}")[0]
    assert rest == log[len(log) - len(rest) :]
    assert len(rest) == len(log) - fails_at + (fails_at == 3)


# -- refused --------------------------------------------------------------------------------------------------------


def fit_with_a_schedule(pretrained: Path) -> None:
    strategy = make_strategy(pretrained)
    trainer = make_trainer(strategy, callbacks=[GradientAccumulationScheduler({0: 1, 2: 4})])
    try:
        trainer.fit(Counted(pretrained), loader(0, 1))
    finally:
        assert strategy.init_report is None  # nothing was read


def fit_without_a_loss(pretrained: Path) -> None:
    module = CausalLM(pretrained)
    module.training_step = lambda *_: None
    make_trainer(make_strategy(pretrained), accumulate_grad_batches=2).fit(module, loader(0, 1))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (
            fit_with_a_schedule,
            "InputError: GradientAccumulationScheduler(scheduling={0: 1, 2: 4}): all epochs must accumulate the same "
            "number of batches",
        ),
        (fit_without_a_loss, "InputError: training_step returned None"),
    ],
)
def test_refused(llama: Path, fit: Any, message: str) -> None:
    ((_, error),) = run_ranks_catching(1, fit, llama)
    assert message in str(error)
