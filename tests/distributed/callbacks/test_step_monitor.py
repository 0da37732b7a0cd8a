"""Figures of a fit with PiSSAStrategy on two ranks, whose batches differ."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.ranks import alone, run_ranks
from helpers.traffic import Traffic
from helpers.training import make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint, CausalLMModule, StepMonitor

STEPS, ACCUMULATE, ROWS, LENGTH = 5, 2, 2, 16
PARTS = ("data", "gather", "compute", "optimizer", "save", "other")


def batches(rank: int) -> list[dict[str, Tensor]]:
    """Right-padded; the numbers of real and trained tokens depend on rank and batch."""
    found = []
    for index in range(STEPS * ACCUMULATE):
        generator = torch.Generator().manual_seed(10 * rank + index)
        ids = torch.randint(3, 256, (ROWS, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, LENGTH - 1 - rank - index % 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : 4 + index % 2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@alone
def fit(pretrained: Path, directory: Path, options: dict[str, Any] | None) -> dict[str, Any]:
    """Five steps, with a checkpoint after the third, and a StepMonitor of `options` unless they are None."""
    monitor = None if options is None else StepMonitor(**options)
    checkpoint = AdapterCheckpoint(directory / "checkpoints", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(
        make_strategy(pretrained),
        steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[checkpoint, *([] if monitor is None else [monitor])],
        enable_checkpointing=True,
        default_root_dir=directory,
        log_every_n_steps=1,
    )
    trainer.loggers = [CSVLogger(directory, name="", version="")]
    module = CausalLMModule(str(pretrained))
    seen: dict[str, Any] = {}

    def end() -> None:
        seen["watched"] = trainer.strategy.gathering.on_wait is not None
        seen["bar"] = set(trainer.progress_bar_metrics)

    module.on_train_end = end
    traffic = Traffic()
    trainer.fit(module, DataLoader(batches(trainer.global_rank), batch_size=None))
    sizes = Counter(nbytes for name, _, nbytes in traffic.calls if name == "all_gather_into_tensor")
    return seen | {"metrics": monitor and monitor.metrics, "gathers": sizes}


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Directory and results by rank of a fit without the callback."""
    directory = tmp_path_factory.mktemp("plain")
    return directory, run_ranks(2, fit, llama, directory, None)


def test_nothing_is_logged_or_watched_without_it(plain: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, (first, _) = plain
    assert not first["watched"]
    assert first["bar"] == {"train_loss"}
    assert not [name for name in rows(directory)[0] if name.startswith("throughput/")]


def test_figures_of_two_ranks_add_up(llama: Path, tmp_path: Path, plain: tuple[Path, list[dict[str, Any]]]) -> None:
    """Steps 2, 3 and 4, then 5; the first is not measured. One all-gather of 8-byte numbers a log."""
    first, second = run_ranks(2, fit, llama, tmp_path, {"every_n_steps": 4})
    assert first["watched"]
    assert first["bar"] == {"train_loss", "tokens/s"}
    assert first["metrics"] == second["metrics"]

    every = rows(tmp_path)
    logged = [row for row in every if row["throughput/tokens_per_s"]]
    assert [int(row["step"]) for row in logged] == [3, 4]
    assert len(every) == STEPS + len(logged)  # `train_loss` has its own rows, as without the callback
    data = [batches(rank) for rank in range(2)]
    for row, steps in zip(logged, (slice(1, 4), slice(4, 5)), strict=True):
        found = {name.removeprefix("throughput/"): float(value) for name, value in row.items() if value}
        part = [batch for one in data for batch in one[steps.start * ACCUMULATE : steps.stop * ACCUMULATE]]
        count = steps.stop - steps.start
        real = sum(int(batch["attention_mask"].sum()) for batch in part)
        assert found["tokens_per_step"] == real / count
        assert found["trained_tokens_per_step"] == sum(int((b["labels"] != -100).sum()) for b in part) / count
        assert found["padding_share"] == 1 - real / (len(part) * ROWS * LENGTH)
        assert sum(found[f"seconds_{part}"] for part in PARTS) == pytest.approx(found["seconds_per_step"])
        assert all(found[f"seconds_{part}"] > 0 for part in PARTS if part != "save")
        assert found["tokens_per_s"] == pytest.approx(found["tokens_per_step"] / found["seconds_per_step"])
        assert found["tokens_per_s_per_rank"] == pytest.approx(found["tokens_per_s"] / 2)
        assert found["gemm_share"] > 0
        assert found["memory_resident_gb"] > 0
    # the step that was saved is the third, and its save is within the first of the rows
    assert float(logged[0]["throughput/seconds_save"]) > float(logged[1]["throughput/seconds_save"])

    more = first["gathers"] - plain[1][0]["gathers"]
    ((nbytes, count),) = more.items()
    assert count == len(logged)
    assert nbytes <= 2 * 8 * 20


def test_every_rank_writes_a_trace(llama: Path, tmp_path: Path) -> None:
    run_ranks(2, fit, llama, tmp_path, {"profile_steps": 2, "profile_all_ranks": True})
    for rank in range(2):
        with gzip.open(tmp_path / f"trace-rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"ProfilerStep#2", "ProfilerStep#3", "compute", "gather", "optimizer", "data", "save"} <= names
    run_ranks(2, fit, llama, tmp_path / "one", {"profile_steps": 2})
    assert [path.name for path in (tmp_path / "one").glob("trace*")] == ["trace-rank0.json.gz"]
