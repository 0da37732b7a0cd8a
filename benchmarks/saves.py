"""Checkpoints of a training run, measured: functions that every rank runs."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from meters import PeakMemory, free_heap, seconds_of
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

from lowrank_dist import NF4, AdapterCheckpoint, PiSSA, PiSSAStrategy
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.storage.atomic import flush_directory
from lowrank_dist.training import checkpointing as checkpointed
from lowrank_dist.training.module import CausalLMModule

MANY = 100_000  # steps: more than are ever taken
WARM_UP = 2  # steps; the first one allocates the moments


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to save."""

    label: str
    background: bool = False
    lightnings: bool = False
    frozen: bool = False


KINDS = (
    Kind(label="ours, in the background", background=True),
    Kind(label="ours, `background=False`"),
    Kind(label="Lightning's, without frozen parameters", lightnings=True),
    Kind(label="Lightning's, with frozen parameters", lightnings=True, frozen=True),
)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is trained: QPiSSA with NF4 on all linears of `model`, a random sequence of `tokens` per rank and step."""

    model: Path
    rank: int
    tokens: int
    precision: str


@dataclass(kw_only=True)
class Save:
    """Seconds of one save: training held up; until all is written; until it is flushed to disk."""

    stall: float
    written: float
    flushed: float


@dataclass(kw_only=True)
class Step:
    """Seconds of a step, and how many of them something was being written."""

    seconds: float
    writing: float


@dataclass(kw_only=True)
class Footprint:
    """One checkpoint: bytes of its files and of those that pickle wrote, and what a rank needed for it, in MB."""

    files: dict[str, int]
    pickled: int
    private: float


@dataclass(kw_only=True)
class Trained:
    """What one rank saw of a training run, by kind of save."""

    start: float
    adapter_bytes: int
    saves: dict[str, list[Save]]
    footprints: dict[str, Footprint]
    plain: list[float]
    beside: list[Step]


class Strategy(PiSSAStrategy):
    """Can save as Lightning's own strategy does."""

    lightnings = False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.lightnings:
            DeepSpeedStrategy.save_checkpoint(self, checkpoint, filepath)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)


class Sequences(Dataset):
    """Random tokens, the same ones at every step."""

    def __init__(self, job: RunSpec) -> None:
        self.ids = torch.randint(3, AutoConfig.from_pretrained(job.model).vocab_size, (job.tokens,))

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "labels": self.ids}


def run_fit(job: RunSpec, callback: L.Callback, checkpoint: Path | None = None) -> Strategy:
    """Train until `callback` stops it."""
    warnings.simplefilter("ignore", UserWarning)  # no validation data, data that cannot be resumed, ...
    for noisy in ("DeepSpeed", "lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    strategy = Strategy(
        job.model,
        LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules="all-linear"),
        PiSSA(),
        NF4(),
        show_progress=False,
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ShardGroup().size,
        precision=job.precision,  # type: ignore[arg-type]
        max_steps=MANY,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback],
        enable_checkpointing=isinstance(callback, AdapterCheckpoint),
    )
    module = CausalLMModule(str(job.model), lr=2e-4, scheduler="constant", warmup_ratio=0.0)
    trainer.fit(module, DataLoader(Sequences(job)), ckpt_path=checkpoint)
    return strategy


# -- saving -----------------------------------------------------------------------------------------------------------


def measure_saves(job: RunSpec, repeats: int, directory: Path) -> Trained:
    """Train; save in every way by turns, with steps in between. The last checkpoint of each kind stays on disk."""
    callback = Saves(directory, repeats)
    run_fit(job, callback)
    return callback.seen


class Saves(AdapterCheckpoint):
    """Saves at the ends of steps, as the callback does, by a plan of its own.

    A round takes, for every kind: a step that nothing happens beside, a save, the steps during which it is written.
    """

    def __init__(self, directory: Path, repeats: int) -> None:
        super().__init__(dirpath=directory, save_top_k=0)
        self._created = time.perf_counter()
        self._repeats = repeats

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.seen = Trained(
            start=time.perf_counter() - self._created,
            adapter_bytes=sum(p.ds_numel * p.element_size() for p in trained),  # type: ignore[attr-defined]
            saves={kind.label: [] for kind in KINDS},
            footprints={},
            plain=[],
            beside=[],
        )
        self._plan = self._rounds(trainer)
        self._writing = _Interval(0.0, 0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._step = _Interval(self._step_began, time.perf_counter())
        if next(self._plan, None) is None:
            trainer.should_stop = True

    def _rounds(self, trainer: L.Trainer) -> Iterator[str]:
        """Between two steps it runs on to the next ``yield``."""
        group = ShardGroup()
        for _ in range(WARM_UP):
            yield "warm-up"
        for kind in KINDS:
            self._measure_footprint(trainer, kind, group)
            yield "after a save"
        for _ in range(self._repeats):
            for kind in KINDS:
                yield "plain"
                self.seen.plain.append(self._step.seconds)
                path = self._path(kind)
                _remove(path, group)
                self.seen.saves[kind.label].append(save := self._measure_save(trainer, kind, path, group))
                while kind.background and _on_any(self._busy(), group):
                    yield "beside a save"
                    self.seen.beside.append(Step(seconds=self._step.seconds, writing=self._step.overlap(self._writing)))
                if kind.background:
                    self._watcher.join()
                    save.written = save.flushed = self._writing.seconds

    def _path(self, kind: Kind) -> Path:
        return Path(str(self.dirpath)) / f"checkpoint-{KINDS.index(kind)}"

    def _save_as(self, trainer: L.Trainer, kind: Kind, path: Path) -> None:
        strategy: Any = trainer.strategy
        strategy.lightnings, strategy.exclude_frozen_parameters = kind.lightnings, not kind.frozen
        if kind.lightnings:
            trainer.save_checkpoint(path)
            return
        self._save_checkpoint(trainer, str(path))
        if not kind.background:
            self._settle(trainer)

    def _measure_save(self, trainer: L.Trainer, kind: Kind, path: Path, group: ShardGroup) -> Save:
        group.raise_together(None)  # all begin together
        began = time.perf_counter()
        self._save_as(trainer, kind, path)
        stall = time.perf_counter() - began
        if kind.background:
            self._watch(began)
        flush = 0.0
        if kind.lightnings:  # not part of it: what a checkpoint that survives a power cut would have taken
            group.raise_together(None)
            flush = seconds_of(lambda: flush_directory(path) if group.rank == 0 else None)
            group.raise_together(None)
        return Save(stall=stall, written=stall, flushed=stall + flush)

    def _busy(self) -> bool:
        return self._save is not None and not self._save.done()

    def _watch(self, began: float) -> None:
        """Note when the writing ends, while steps go on."""
        self._writing = _Interval(began, float("inf"))

        def watch() -> None:
            while self._busy():
                time.sleep(0.002)
            self._writing = _Interval(began, time.perf_counter())

        self._watcher = threading.Thread(target=watch)
        self._watcher.start()

    def _measure_footprint(self, trainer: L.Trainer, kind: Kind, group: ShardGroup) -> None:
        """Save once while training waits for it, so that none of its memory is counted."""
        path = self._path(kind)
        free_heap()
        group.raise_together(None)
        with PeakMemory() as memory:
            self._save_as(trainer, kind, path)
            self._settle(trainer)
            group.raise_together(None)
        files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        pickled = sum(size for name, size in files.items() if _is_pickle(path / name))
        self.seen.footprints[kind.label] = Footprint(files=files, pickled=pickled, private=memory.private)


@dataclass(frozen=True)
class _Interval:
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    def overlap(self, other: _Interval) -> float:
        return max(0.0, min(self.stop, other.stop) - max(self.start, other.start))


def _is_pickle(path: Path) -> bool:
    """Whether `torch.save` wrote it."""
    return zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())


def _on_any(flag: bool, group: ShardGroup) -> bool:
    return bool(group.max(torch.tensor(int(flag))))


def _remove(path: Path, group: ShardGroup) -> None:
    if group.rank == 0:
        shutil.rmtree(path)
    group.raise_together(None)


# -- resuming ---------------------------------------------------------------------------------------------------------

#: What a resumed run does in addition to a fresh one, by column.
RESUMING: dict[str, list[tuple[Any, str]]] = {
    "verify": [(TrainingCheckpoint, "verify")],
    "load": [(checkpointed, "load_parameters"), (checkpointed, "load_optimizer")],
}


@dataclass(kw_only=True)
class Start:
    """Seconds of one rank from the process group to the first step, and of parts of them.

    `error` is what DeepSpeed said when it was to load a checkpoint of its own, if anything.
    """

    seconds: float
    parts: dict[str, float]
    error: str


def measure_start(job: RunSpec, ours: Path | None, theirs: Path | None) -> Start:
    """Start fresh or from `ours`; after a step have DeepSpeed load `theirs`."""
    callback = _FirstStep(theirs)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(_stopwatch(places)) for name, places in RESUMING.items()}
        began = time.perf_counter()
        strategy = run_fit(job, callback, ours)
    assert strategy.init_report is not None
    found = {name: sum(times) for name, times in parts.items()} | {"residual": strategy.init_report.seconds}
    return Start(seconds=callback.began - began, parts=found, error=callback.error)


class _FirstStep(L.Callback):
    """Ends a run after its first step; DeepSpeed loads a checkpoint of its own then, as Lightning's strategy has it."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint, self.error = checkpoint, ""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = True
        strategy: Any = trainer.strategy
        try:
            if self.checkpoint is not None:
                DeepSpeedStrategy.load_checkpoint(strategy, self.checkpoint)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


@contextmanager
def _stopwatch(places: list[tuple[Any, str]]) -> Iterator[list[float]]:
    """Seconds of every call of the functions at `places`."""
    times: list[float] = []

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - began)

        return call

    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield times
