"""Streams: every record on one rank, in an order that a resumed run goes on with, and no rank that runs dry."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning as L
import pytest
import torch

from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.streaming import Stream, StreamLoader, StreamSettings, stream_position, stream_state
from lowrank_dist.errors import InputError

COUNT = 50
RECORDS = [{"prompt": f"hello {index:02}", "completion": " world" * (1 + index % 5)} for index in range(COUNT)]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> str:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "train.jsonl", RECORDS)


def settings_of(tokenizer: str, train: Any, **options: Any) -> StreamSettings:
    module = SFTDataModule(tokenizer, train, streaming=True, **{"shuffle_buffer": 8, **options})
    module.setup("fit")
    assert module.stream_settings is not None
    return module.stream_settings


def numbers(batches: Any) -> list[int]:
    """Numbers of the records in batches."""
    texts = [byte_level_tokenizer().decode(row) for batch in batches for row in batch["input_ids"]]
    return [int(text[place + 6 : place + 8]) for text in texts for place in _places(text, "hello ")]


def _places(text: str, word: str) -> list[int]:
    return [place for place in range(len(text)) if text.startswith(word, place)]


def stream(settings: StreamSettings, ranks: int, rank: int, start: tuple[int, int] = (0, 0)) -> Any:
    return iter(Stream(settings, num_replicas=ranks, rank=rank, start=start))


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_share_the_records_of_every_pass(tokenizer_dir: str, train: str, packing: bool) -> None:
    settings = settings_of(tokenizer_dir, train, packing=packing, max_length=64)
    for ranks in (1, 2, 3):
        seen: Counter[int] = Counter()
        for rank in range(ranks):
            batches = [batch for batch, (block, _) in _until(stream(settings, ranks, rank), block=3 * COUNT // 8 + 3)]
            mine = numbers(batches)
            # three passes of the ranks together
            seen.update(mine[: 3 * COUNT // ranks])
        if not packing:
            assert max(seen.values()) - min(seen.values()) <= 2
        assert set(seen) == set(range(COUNT))
        first = [numbers(b for b, _ in _until(stream(settings, ranks, rank), block=2)) for rank in range(ranks)]
        assert (
            len({number for one in first for number in one}) == sum(map(len, first)) == 16 * ranks
        )  # no record on two ranks


def _until(batches: Any, *, block: int) -> Any:
    for batch, position in batches:
        if position[0] >= block:
            return
        yield batch, position


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}, {"batch_size": 3}, {"limit": 11}])
def test_a_stream_goes_on_from_any_position(tokenizer_dir: str, train: str, options: dict[str, Any]) -> None:
    settings = settings_of(tokenizer_dir, train, **options)
    for ranks, rank in ((1, 0), (3, 2)):
        whole = list(islice(stream(settings, ranks, rank), 60))  # more than a pass
        for step in (1, 4, 5, 17, 40):
            rest = list(islice(stream(settings, ranks, rank, whole[step - 1][1]), 60 - step))
            assert [b["input_ids"].tolist() for b, _ in rest] == [b["input_ids"].tolist() for b, _ in whole[step:]]
            assert [position for _, position in rest] == [position for _, position in whole[step:]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_few_records_fill_the_buffer_once(
    tokenizer_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, ranks: int
) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", RECORDS[:20])
    with caplog.at_level(logging.WARNING):
        settings = settings_of(tokenizer_dir, path, shuffle_buffer=1000)
        batches = list(islice(stream(settings, ranks, 0), 60))
    size = 20 // ranks
    seen = numbers(batch for batch, _ in batches)
    assert all(len(set(seen[at : at + size])) == size for at in range(0, 60 - size + 1, size))
    assert len({tuple(seen[at : at + size]) for at in range(0, 60, size)}) > 1
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("few.jsonl': all 20 records have 20 examples")
    assert said[1:] == ["train: all 20 records were read; they are read again"]
    rest = list(islice(stream(settings, ranks, 0, batches[24][1]), 20))
    assert [numbers([batch]) for batch, _ in rest] == [numbers([batch]) for batch, _ in batches[25:45]]


def test_fewer_records_than_ranks_leave_no_rank_without(tokenizer_dir: str, tmp_path: Path) -> None:
    settings = settings_of(tokenizer_dir, write_jsonl(tmp_path / "few.jsonl", RECORDS[:3]))
    for rank in range(5):
        assert set(numbers(batch for batch, _ in islice(stream(settings, 5, rank), 30))) == {0, 1, 2}
    # of two ranks one has only records without a response within the length
    records = [RECORDS[0], {"prompt": "hello" * 100, "completion": "a"}] * 4
    settings = settings_of(tokenizer_dir, write_jsonl(tmp_path / "odd.jsonl", records), max_length=32)
    assert len(list(islice(stream(settings, 2, 0), 30))) == 30
    with pytest.raises(InputError, match="rank 1 has read its records twice, and none is left: 8 of 8 examples are"):
        next(stream(settings, 2, 1))


def test_bad_records_are_skipped_and_counted_or_an_error(
    tokenizer_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:20]) + '{\n{"prompt": 1}\n')
    settings = settings_of(tokenizer_dir, str(path), on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        list(islice(stream(settings, 1, 0), 45))
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("train: rank 0 has skipped 1 records so far; ") or "skipped 2" in line for line in said)
    assert "train: all 21 records were read; they are read again" in said
    settings = settings_of(tokenizer_dir, str(path))
    with pytest.raises(InputError, match=rf"^{path}:21: not valid JSON"):
        list(islice(stream(settings, 1, 0), 45))
    for text, message in (("{}\n", "bad.jsonl:1: columns found: none"), ("", "none of the first 0 records is left")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            settings_of(tokenizer_dir, str(path))


def test_what_does_not_go_with_streaming_is_named(tokenizer_dir: str, train: str) -> None:
    weighted: Any = [{"path": train, "weight": 2}, {"path": train, "weight": 1}]
    for arguments, message in (
        ({"group_by_length": True}, "^group_by_length=True sorts the whole set by length, and streaming=True"),
        ({"tokens_per_batch": 512}, "^tokens_per_batch=512 divides the whole set into batches"),
        ({"num_workers": 2}, "^num_workers=2: a stream is read in one process a rank; set it to 0 or 1"),
        ({"shuffle_buffer": 0}, "^shuffle_buffer=0 must be at least 1"),
        ({"train": weighted}, r"^train\[0\].weight=2: shares need the number of examples"),
    ):
        given: Any = {"train": train, **arguments}
        with pytest.raises(InputError, match=message):
            SFTDataModule("t", streaming=True, **given)
    with pytest.raises(InputError, match="task='classification' needs all labels before training"):
        SFTDataModule(tokenizer_dir, train, task="classification", streaming=True).setup("fit")
    for trainer, message in (
        (SimpleNamespace(max_steps=-1, overfit_batches=0), "streaming=True with max_steps=-1: a stream has no end"),
        (SimpleNamespace(max_steps=5, overfit_batches=2), "overfit_batches=2 needs a set that can be read again"),
    ):
        data = SFTDataModule(tokenizer_dir, train, train, streaming=True)
        data.trainer = SimpleNamespace(lightning_module=None, **vars(trainer))  # type: ignore[assignment]
        with pytest.raises(InputError, match=message):
            data.setup("fit")


def test_a_state_of_other_runs_is_refused(tokenizer_dir: str, train: str) -> None:
    settings = settings_of(tokenizer_dir, train)
    state = stream_state(settings, [(3, 1), (2, 7)])
    assert stream_position(json.loads(json.dumps(state)), settings, num_replicas=2, rank=1) == (2, 7)
    assert stream_position({}, settings, num_replicas=2, rank=1) is None
    with pytest.raises(InputError, match="streamed its data on 2 ranks, and this one has 3"):
        stream_position(state, settings, num_replicas=3, rank=0)
    with pytest.raises(InputError, match="streamed its data, and this one does not: .* set streaming to true"):
        stream_position(state, None, num_replicas=2, rank=0)
    with pytest.raises(InputError, match="did not stream its data, and this one does: .* set streaming to false"):
        stream_position({"epoch": 0, "start": 3, "order_step_size": 2}, settings, num_replicas=2, rank=0)
    for options in ({"seed": 5}, {"shuffle_buffer": 9}, {"max_length": 64}):
        with pytest.raises(InputError, match="its blocks are others; resume with the same"):
            stream_position(state, settings_of(tokenizer_dir, train, **options), num_replicas=2, rank=0)


def test_a_copy_of_the_loader_reads_without_moving_it(tokenizer_dir: str, train: str) -> None:
    """As a calibration does, before the training."""
    data = SFTDataModule(tokenizer_dir, train, streaming=True, shuffle_buffer=8)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    ahead = list(islice(copy.copy(loader), 10))
    assert loader.position() == (0, 0)
    assert numbers(islice(loader, 10)) == numbers(ahead)
    assert loader.position() == (1, 2)
    assert numbers(islice(data.sharded_dataloader(num_replicas=2, rank=0), 4)) != numbers(ahead[:4])


def test_hub_ids_are_streamed(tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return datasets.Dataset.from_list(RECORDS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = SFTDataModule(tokenizer_dir, [{"path": "org/set", "split": "all"}], streaming=True)
    data.prepare_data()
    assert calls == []
    data.setup("fit")
    assert calls == [{"split": "all", "streaming": True}]


# ------------------------------------------------------------------------------------- under Lightning
class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight**2

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated += len(batch["input_ids"])

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches in (self.trainer.max_steps, float("inf"))
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(L.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


def fit(data: Any, tmp_path: Path, checkpoint: Path | None = None, **settings: Any) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_steps": 30, **settings},
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return module


def test_loaders_that_are_made_anew_go_on(tokenizer_dir: str, train: str, tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None, **options: Any) -> list[list[list[int]]]:
        data = SFTDataModule(tokenizer_dir, train, batch_size=2, streaming=True, shuffle_buffer=8)
        settings: Any = {"max_steps": 12, "max_epochs": -1, "limit_train_batches": 4, **options}
        return fit(data, tmp_path, checkpoint, **settings).seen

    whole = run(limit_train_batches=1.0)
    assert run() == whole
    saver = Saver(tmp_path)
    assert run(reload_dataloaders_every_n_epochs=1, callbacks=[saver]) == whole
    for step in (3, 4, 6):
        assert run(tmp_path / f"{step}.ckpt", reload_dataloaders_every_n_epochs=1) == whole[step:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumes(tokenizer_dir: str, train: str, tmp_path: Path, workers: int) -> None:
    def data() -> SFTDataModule:
        return SFTDataModule(
            tokenizer_dir, train, train, batch_size=2, streaming=True, shuffle_buffer=8, num_workers=workers
        )

    options: Any = {"accumulate_grad_batches": 2, "val_check_interval": 20}
    whole = fit(data(), tmp_path, callbacks=[Saver(tmp_path)], **options)
    assert len(whole.seen) == 60
    assert whole.validated >= 3 * COUNT  # every 20 batches
    for step in (3, 16):
        resumed = fit(data(), tmp_path, tmp_path / f"{step}.ckpt", **options)
        assert resumed.seen == whole.seen[2 * step :]
