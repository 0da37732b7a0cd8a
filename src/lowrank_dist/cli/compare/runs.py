"""What runs have left in their directories, read for a comparison."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_dist.checkpoints.layout import newest_checkpoint
from lowrank_dist.cli.compare.settings import Settings, flat, read_settings
from lowrank_dist.cli.report_page import HISTORY, METRICS
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.storage.inspect import inspect
from lowrank_dist.storage.layout import ADAPTER_DIR, LORA_DIR
from lowrank_dist.storage.parse import MAX_JSON, MAX_MANIFEST, Record, is_number, printable, read_bytes, read_record

CONFIG, INIT_REPORT = "config.yaml", "init_report.json"
_TASKS = "tasks/"
_MEMORY = ("throughput/memory_allocated_gb", "throughput/memory_resident_gb")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss. `seconds` of training before it, without validations; None if they were not recorded."""

    step: int
    loss: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as its files tell of it. What they do not tell is None.

    Attributes
    ----------
    directory
        Where its configuration lies.
    settings
        From `lowrank_dist.cli.compare.settings.flat`.
    seed
        ``seed_everything``.
    train, validation
        Losses by step.
    init_seconds
        Of the initialisation.
    memory_gb
        The most of a rank.
    trained
        Trained parameters, from the newest checkpoint.
    adapter_bytes
        Bytes on disk of its ``lora/``, or of its ``adapter/`` where there is no LoRA.
    scores
        Last scores of `EvaluateTasks`, by task and metric.
    """

    directory: Path
    settings: Settings
    seed: str
    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    init_seconds: float | None = None
    memory_gb: float | None = None
    trained: int | None = None
    adapter_bytes: int | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step of which there is any loss."""
        return max((point.step for point in (*self.train, *self.validation)), default=0)

    @property
    def seconds(self) -> float | None:
        """Of training, validations apart."""
        return max((p.seconds for p in (*self.train, *self.validation) if p.seconds is not None), default=None)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories and below them, by directory.

    Raises
    ------
    InputError
        If there is none in one of them, or a file is damaged.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        configs = sorted(path.rglob(CONFIG)) if path.is_dir() else []
        below = [run for config in configs if (run := _read(config)) is not None]
        if not below:
            raise InputError(
                f"{path}: no run here: no {CONFIG} of `lowrank-dist fit` with losses beside it ({HISTORY} of "
                f"LossHistory, or {METRICS} of CSVLogger)"
            )
        found |= {run.directory.resolve(): run for run in below}
    return list(found.values())


def _read(config: Path) -> Run | None:
    """The run of a configuration; None if there are no losses."""
    directory, settings = config.parent, read_settings(config)
    history, metrics = _record(directory, HISTORY), _record(directory, METRICS)
    logged = {} if metrics is None else _columns(metrics)
    if history is not None:
        train, validation = _history(history)
    elif metrics is not None:
        train, validation = (logged.get(name, []) for name in ("train_loss", "val_loss"))
    else:
        return None
    init = _record(directory, INIT_REPORT)
    newest = _newest(directory, settings)
    return Run(
        directory=directory,
        settings=flat(settings),
        seed=str(settings.get("seed_everything")),
        train=train,
        validation=validation,
        init_seconds=None if init is None else read_record(init, MAX_MANIFEST).get("seconds"),
        memory_gb=max((point.loss for name in _MEMORY for point in logged.get(name, [])), default=None),
        trained=None if newest is None else inspect(newest).facts.get("trained parameters"),
        adapter_bytes=None if newest is None else _adapter_bytes(newest),
        scores={name.removeprefix(_TASKS): of[-1].loss for name, of in logged.items() if name.startswith(_TASKS)},
    )


def _record(directory: Path, name: str) -> Path | None:
    file = directory / name
    return file if file.is_file() else None


def _history(file: Path) -> tuple[list[Point], list[Point]]:
    found = read_record(file)
    return _points(found, "train", file), _points(found, "validation", file)


def _points(found: Record, part: str, file: Path) -> list[Point]:
    points = []
    for entry in (Record(entry, f"{file}: {part}") for entry in found.records(part)):
        loss = entry.expect("loss", lambda value: value is None or is_number(value), "a number")
        seconds = entry.expect("seconds", is_number, "a number", None)
        points.append(Point(step=entry.integer("step"), loss=math.nan if loss is None else loss, seconds=seconds))
    return points


def _columns(file: Path) -> dict[str, list[Point]]:
    """The columns of CSVLogger's table; a later line of a step replaces an earlier one."""
    found: dict[str, dict[int, float]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_bytes(file, MAX_JSON).decode("utf-8"))):
            step = int(row["step"]) + 1  # Lightning numbers steps from 0 in its loggers
            for name, value in row.items():
                if value:
                    found.setdefault(str(name), {})[step] = float(value)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a table of CSVLogger ({printable(error)})") from error
    return {name: [Point(step=step, loss=of[step]) for step in sorted(of)] for name, of in found.items()}


def _newest(directory: Path, settings: dict[str, Any]) -> Path | None:
    """The newest checkpoint of the run."""
    found = (newest_checkpoint(place) for place in checkpoint_places(directory, settings) if place.is_dir())
    return next((newest for newest in found if newest is not None), None)


def _adapter_bytes(checkpoint: Path) -> int | None:
    """Bytes of what is taken from a checkpoint to be loaded elsewhere."""
    taken = next((part for name in (LORA_DIR, ADAPTER_DIR) if (part := checkpoint / name).is_dir()), None)
    return None if taken is None else sum(file.stat().st_size for file in taken.iterdir())


def checkpoint_places(directory: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Where the run's callbacks write checkpoints: in their ``dirpath``, by default beside the configuration."""
    callbacks = settings["trainer"].get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = callback.get("init_args") if isinstance(callback, dict) else None
        dirpath = arguments.get("dirpath") if isinstance(arguments, dict) else None
        if not isinstance(dirpath, str):
            continue
        if Path(dirpath).is_absolute():
            yield Path(dirpath)
        elif (started := _started_in(directory, settings["trainer"])) is not None:
            yield started / dirpath
    yield directory / "checkpoints"


def _started_in(directory: Path, trainer: dict[str, Any]) -> Path | None:
    """The directory in which a run was started, from which its relative paths count; None if nothing tells.

    The configuration of a run in ``work/runs/a`` that names its own directory ``runs/a`` was started in ``work``.
    """
    loggers = trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = logger.get("init_args") if isinstance(logger, dict) else None
        save_dir = arguments.get("save_dir") if isinstance(arguments, dict) else None
        if (found := _without_end(directory, save_dir)) is not None:
            return found
    return _without_end(directory, trainer.get("default_root_dir") or ".")


def _without_end(directory: Path, named: Any) -> Path | None:
    """`directory` up to the relative path `named`; below it may lie the name and the version of a logger."""
    if not isinstance(named, str) or Path(named).is_absolute():
        return None
    end = Path(os.path.normpath(named)).parts
    place = Path(os.path.abspath(directory))
    places = (place, *place.parents)
    if not end:  # the directory itself, unless a logger made one in it
        return next((place.parent for place in places[:2] if place.name == "lightning_logs"), places[0])
    return next((place.parents[len(end) - 1] for place in places if place.parts[-len(end) :] == end), None)
