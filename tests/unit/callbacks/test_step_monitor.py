"""Fits of a toy model: what is counted, where time goes, what is logged and traced."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_dist import StepMonitor
from lowrank_dist.callbacks.flops import FlopCount, matmul_rate
from lowrank_dist.callbacks.timeline import Timeline
from lowrank_dist.errors import InputError

WIDTH, VOCABULARY, ROWS, LENGTH = 8, 16, 2, 12
# the loaders have no workers, which toy data need none of
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
PARTS = ("data", "gather", "compute", "optimizer", "save", "other")


def batches(count: int) -> list[dict[str, Tensor]]:
    """Batch i has ``LENGTH - i % 4`` real tokens in its first row, all in the others, and half of them labels."""
    found = []
    for index in range(count):
        mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        mask[0, LENGTH - index % 4 :] = 0
        labels = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        labels[:, : LENGTH // 2] = -100
        labels[mask == 0] = -100
        found.append({"input_ids": torch.ones_like(mask), "attention_mask": mask, "labels": labels})
    return found


def real(batch: dict[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum())


def trained(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"] != -100).sum())


class Toy(L.LightningModule):
    """An embedding and a head, both trained; sleeps as long as it is told to, in each part of a step."""

    def __init__(self, **sleeps: float) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.sleeps = sleeps

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        time.sleep(self.sleeps.get("compute", 0.0))
        logits = self.head(self.embedding(batch["input_ids"]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: time.sleep(self.sleeps.get("optimizer", 0.0)))
        return optimizer


class Validated(Toy):
    """Sleeps in validation, and knows how long."""

    validated = 0.0

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        began = time.perf_counter()
        time.sleep(0.5)
        self.validated += time.perf_counter() - began


class Slow(list[dict[str, Tensor]]):
    seconds = 0.0

    def __getitem__(self, index: Any) -> Any:
        time.sleep(self.seconds)
        return super().__getitem__(index)


class SlowCheckpoint(ModelCheckpoint):
    seconds = 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)
        super().on_train_batch_end(*args, **kwargs)


def fit(directory: Path, data: Any, *callbacks: L.Callback, module: Toy | None = None, **options: Any) -> L.Trainer:
    """Over all of `data`."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=directory,
        logger=CSVLogger(directory, name="", version=""),
        callbacks=list(callbacks),
        **{
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        },
    )
    validation = options.get("val_check_interval") and DataLoader(batches(1), batch_size=None)
    trainer.fit(module or Toy(), DataLoader(data, batch_size=None), validation)
    return trainer


def rows(directory: Path) -> list[dict[str, float]]:
    """What the callback has logged, by the names without their prefix."""
    with (directory / "metrics.csv").open() as file:
        read = list(csv.DictReader(file))
    return [
        {name.removeprefix("throughput/"): float(value) for name, value in row.items() if value}
        for row in read
        if row.get("throughput/tokens_per_s")
    ]


def add_up(row: dict[str, float]) -> None:
    assert sum(row[f"seconds_{part}"] for part in PARTS) == pytest.approx(row["seconds_per_step"], rel=1e-9)
    assert all(row[f"seconds_{part}"] >= 0 for part in PARTS)
    assert row["tokens_per_s"] * row["seconds_per_step"] == pytest.approx(row["tokens_per_step"], rel=1e-9)
    assert row["trained_tokens_per_s"] * row["seconds_per_step"] == pytest.approx(row["trained_tokens_per_step"])
    assert row["gemm_share"] > 0
    assert row["memory_resident_gb"] > 0


@pytest.mark.parametrize(("every", "accumulate"), [(None, 1), (2, 1), (2, 3), (4, 2)])
def test_tokens_are_counted_exactly(tmp_path: Path, every: int | None, accumulate: int) -> None:
    """12 batches. The first step is not measured; the last steps are, also where they do not fill an interval."""
    data = batches(12)
    trainer = fit(tmp_path, data, StepMonitor(every_n_steps=every), accumulate_grad_batches=accumulate)
    steps = [data[begin : begin + accumulate] for begin in range(0, 12, accumulate)]
    ends = sorted({*range(every or 1, len(steps) + 1, every or 1), len(steps)} - {1})
    found, begin = rows(tmp_path), 1
    assert [row["step"] for row in found] == [end - 1 for end in ends]
    for row, end in zip(found, ends, strict=True):
        group = [batch for step in steps[begin:end] for batch in step]
        count, begin = end - begin, end
        assert row["tokens_per_step"] == sum(map(real, group)) / count
        assert row["trained_tokens_per_step"] == sum(map(trained, group)) / count
        assert row["padding_share"] == 1 - sum(map(real, group)) / (len(group) * ROWS * LENGTH)
        assert row["tokens_per_s_per_rank"] == row["tokens_per_s"]
        add_up(row)
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"


def test_the_progress_bar_gets_tokens_per_second(tmp_path: Path) -> None:
    monitor = StepMonitor()
    trainer = fit(tmp_path, batches(3), monitor)
    assert trainer.progress_bar_metrics["tokens/s"] == pytest.approx(monitor.metrics["throughput/tokens_per_s"])


def test_every_part_gets_its_own_time(tmp_path: Path) -> None:
    """Sleeps are lower bounds: a part that lasts at least as long as its sleep, and leaves the others theirs."""
    data, checkpoint = Slow(batches(8)), SlowCheckpoint(tmp_path, every_n_train_steps=1)
    data.seconds, checkpoint.seconds = 0.05, 0.04
    module = Toy(compute=0.03, optimizer=0.02)
    fit(tmp_path, data, checkpoint, StepMonitor(every_n_steps=8), module=module, enable_checkpointing=True)
    (row,) = rows(tmp_path)
    add_up(row)
    for part, least in {"data": 0.05, "save": 0.04, "compute": 0.03, "optimizer": 0.02, "gather": 0.0}.items():
        assert row[f"seconds_{part}"] >= least
    assert row["seconds_gather"] == 0


def test_saves_of_others_are_saves(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    fit(tmp_path, batches(4), Saves(), StepMonitor(every_n_steps=4))
    (row,) = rows(tmp_path)
    add_up(row)
    assert row["seconds_save"] > 0


def test_validation_is_not_measured(tmp_path: Path) -> None:
    """Steps and validation together last no longer than the training."""

    class Watch(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    module, watch = Validated(), Watch()
    fit(tmp_path, batches(6), watch, StepMonitor(), module=module, val_check_interval=2)
    assert module.validated >= 1.5
    measured = rows(tmp_path)
    assert len(measured) == 5
    assert sum(row["seconds_per_step"] for row in measured) + module.validated <= watch.seconds


def test_nothing_is_logged_without_the_callback(tmp_path: Path) -> None:
    trainer = fit(tmp_path, batches(3))
    assert rows(tmp_path) == []
    assert set(trainer.logged_metrics) == {"train_loss"}


def test_where_nothing_is_logged_there_is_still_a_trace(tmp_path: Path) -> None:
    monitor = StepMonitor(profile_steps=1)
    fit(tmp_path, batches(3), monitor, log_every_n_steps=0)
    assert monitor.metrics == {}
    assert (tmp_path / "trace-rank0.json.gz").is_file()


# -- flops ------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_products(tmp_path: Path) -> None:
    """The head: forward, gradient of its input, gradient of its weight. An embedding has none."""
    monitor = StepMonitor()
    fit(tmp_path, batches(2), monitor)
    assert monitor.flops_per_position == 3 * 2 * WIDTH * VOCABULARY


def test_only_what_runs_within_the_count_is_counted() -> None:
    matrix, count = torch.ones(4, 4, requires_grad=True), FlopCount()
    matrix @ matrix
    with count:
        (matrix @ matrix).sum().backward()
    assert count.total == 3 * 2 * 4**3


def test_the_rate_of_products_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert matmul_rate(torch.device("cpu"), torch.bfloat16, repeats=1) > 0
    assert torch.equal(torch.get_rng_state(), before)


# -- time -------------------------------------------------------------------------------------------------------------


def test_time_counts_for_the_innermost_part() -> None:
    began = time.perf_counter()
    timeline = Timeline(torch.device("cpu"))
    timeline.enter("compute")
    time.sleep(0.01)
    timeline.enter("gather")
    time.sleep(0.02)
    timeline.leave("gather")
    timeline.enter("optimizer")
    timeline.leave("compute")  # with what is open in it
    assert timeline.part == Timeline.OTHER
    timeline.leave("gather")  # which is not open
    seconds = timeline.read()
    assert set(seconds) == {"compute", "gather", "optimizer", "other"}
    assert seconds["compute"] >= 0.01
    assert seconds["gather"] >= 0.02
    assert sum(seconds.values()) <= time.perf_counter() - began
    assert set(timeline.read()) == {"other"}


# -- trace ------------------------------------------------------------------------------------------------------------


def test_a_trace_names_steps_and_parts(tmp_path: Path) -> None:
    fit(tmp_path, batches(8), StepMonitor(profile_steps=2), accumulate_grad_batches=2)
    with gzip.open(tmp_path / "trace-rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}
    assert names.count("compute") == 4  # batches of two steps
    assert {"data", "optimizer"} <= set(names)


def test_a_fit_too_short_for_a_trace_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the fit ended before its third step"):
        fit(tmp_path, batches(2), StepMonitor(profile_steps=2))
    assert not list(tmp_path.glob("trace*"))


def test_a_trace_of_fewer_steps_says_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, batches(3), StepMonitor(profile_steps=2))
    path = tmp_path / "trace-rank0.json.gz"
    assert f"Trace of 1 step: {path}; open it in https://ui.perfetto.dev" in caplog.text
    with gzip.open(path) as file:
        assert "ProfilerStep#2" in {event.get("name") for event in json.load(file)["traceEvents"]}


def test_after_an_exception_the_trainer_is_as_before(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            raise RuntimeError("of the model")

    module = Failing()
    with pytest.raises(RuntimeError, match="of the model"):
        fit(tmp_path, batches(2), StepMonitor(), module=module)
    assert type(module.trainer.profiler).__name__ == "PassThroughProfiler"  # type: ignore[attr-defined]
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"profile_steps": -1}], ids=repr)
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        StepMonitor(**options)  # type: ignore[arg-type]
