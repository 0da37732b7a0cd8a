"""Checks of a job's options against its configuration, before anything is submitted."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lowrank_dist.checkpoints.layout import newest_checkpoint
from lowrank_dist.errors import CheckpointError
from lowrank_dist.slurm.options import DEFAULT_TIMEOUT, SubmitError, SubmitOptions, check_line
from lowrank_dist.training.fit_cli import module_settings

_CHECKPOINT = "lowrank_dist.AdapterCheckpoint"
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """Resources that a configuration requests.

    Attributes
    ----------
    nodes, devices
        ``trainer.num_nodes`` and ``trainer.devices``; with `accumulate` they fix the global batch.
    accumulate
        ``trainer.accumulate_grad_batches``.
    on_gpu
        Whether the job needs GPUs.
    counts
        Numbers of nodes on which the job may run.
    root
        ``trainer.default_root_dir``.
    has_timeout
        Whether the strategy takes a timeout for collectives that the configuration leaves at its default.
    warnings
        Possible mistakes that do not prevent submission.
    """

    nodes: int
    devices: int
    accumulate: int
    on_gpu: bool
    counts: tuple[int, ...]
    root: Path
    has_timeout: bool
    warnings: tuple[str, ...]

    @property
    def batches(self) -> int:
        """Batches per step, over all ranks."""
        return self.nodes * self.devices * self.accumulate

    @property
    def resources(self) -> tuple[object, ...]:
        """What a job array requests once for all of its jobs."""
        return self.nodes, self.devices, self.on_gpu, self.counts


def accumulated(*, batches: int, nodes: int, devices: int) -> int:
    """Batches that each of ``nodes * devices`` ranks accumulates in a step of `batches` batches.

    Raises
    ------
    SubmitError
        If `batches` is not a multiple of the number of ranks.
    """
    if batches % (nodes * devices):
        raise SubmitError(
            f"a step of {batches} batches cannot be split evenly over {nodes} nodes of {devices} ranks; nodes x ranks "
            "must divide it: change --min-nodes, or batch_size and accumulate_grad_batches"
        )
    return batches // (nodes * devices)


def check(options: SubmitOptions, settings: Any) -> JobShape:
    """Compare options with the parsed settings of ``lowrank-dist fit``.

    Raises
    ------
    SubmitError
        For the first option that would make the job fail or change what it trains.
    """
    trainer = settings.trainer
    devices, nodes = _devices(trainer.devices), int(trainer.num_nodes)
    for option, given, key, value in (
        ("--nodes", options.nodes, "num_nodes", nodes),
        ("--gpus-per-node", options.gpus_per_node, "devices", devices),
    ):
        if given is not None and given != value:
            raise SubmitError(
                f"{option} {given}, but trainer.{key} is {value} in {options.job_name}: the global batch would change; "
                f"if you want that, pass --trainer.{key}={given} (and adapt trainer.accumulate_grad_batches or "
                "data.batch_size)"
            )
    if options.cluster == "local" and nodes > 1:
        raise SubmitError(
            f"--cluster local is one machine, but trainer.num_nodes is {nodes}; pass --trainer.num_nodes=1 "
            f"--trainer.devices={nodes * devices}, or fewer devices if the machine is too small"
        )
    accumulate = int(trainer.accumulate_grad_batches or 1)
    least = options.min_nodes or nodes
    if least > nodes:
        raise SubmitError(f"--min-nodes {least} is more than trainer.num_nodes={nodes}")
    counts = tuple(range(least, nodes + 1))
    for count in counts:
        accumulated(batches=nodes * devices * accumulate, nodes=count, devices=devices)
    _check_checkpoints(options, trainer)
    _check_requeue(trainer)
    _check_resumption(settings)
    has_timeout = _has_timeout(trainer.strategy)
    if not has_timeout and options.collective_timeout != DEFAULT_TIMEOUT:
        raise SubmitError(
            f"--collective-timeout {options.collective_timeout} has no effect: the strategy takes no timeout, or the "
            "configuration sets it; leave the option out, or set trainer.strategy.init_args.timeout"
        )
    root = Path(trainer.default_root_dir or ".").absolute()
    warnings = [*_check_paths(settings, options), *_check_root(root, options)]
    return JobShape(
        nodes=nodes,
        devices=devices,
        accumulate=accumulate,
        on_gpu=_on_gpu(trainer.accelerator),
        counts=counts,
        root=root,
        has_timeout=has_timeout,
        warnings=tuple(warnings),
    )


def _devices(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise SubmitError(
            f"trainer.devices is {value!r}, but a job needs the number of ranks per node; pass, for example, "
            "--trainer.devices=8"
        ) from None


def _on_gpu(accelerator: Any) -> bool:
    if accelerator in ("gpu", "cuda"):
        return True
    if accelerator == "cpu":
        return False
    raise SubmitError(
        f"trainer.accelerator is {accelerator!r}, but the nodes may differ from this machine; choose gpu or cpu"
    )


def _class_path(part: Any) -> str:
    return str(getattr(part, "class_path", ""))


def _saving(trainer: Any) -> list[Any]:
    return [part for part in _callbacks(trainer) if _class_path(part).endswith(_CHECKPOINT.split(".")[-1])]


def _callbacks(trainer: Any) -> list[Any]:
    return _listed(trainer.callbacks)


def _listed(parts: Any) -> list[Any]:
    """One part or several, as the parser of ``fit`` takes them."""
    if parts is None:
        return []
    return parts if isinstance(parts, list) else [parts]


def written_paths(settings: Any) -> dict[Path, str]:
    """Paths outside of a run's own directory to which its callbacks write, with the key that sets each."""
    found = {}
    for part in _callbacks(settings.trainer):
        arguments = getattr(part, "init_args", {})
        for key in ("dirpath", "path"):
            value = arguments.get(key)
            # a relative dirpath is one of the working directory, a relative path is one of the run's
            if isinstance(value, str | Path) and (key == "dirpath" or Path(value).is_absolute()):
                found[Path(value).absolute()] = f"{_class_path(part).rpartition('.')[2]}.{key}"
    return found


def _check_checkpoints(options: SubmitOptions, trainer: Any) -> None:
    saving = _saving(trainer)
    if not saving:
        raise SubmitError(
            f"{options.job_name} has no {_CHECKPOINT}: a preempted job would start over; add it to trainer.callbacks"
        )
    arguments, limit = saving[0].init_args, timedelta(minutes=options.minutes)
    interval = arguments.get("train_time_interval")
    steps = arguments.get("every_n_train_steps")
    if options.seconds_per_step is not None:
        if interval is not None or not steps:
            raise SubmitError(
                f"--seconds-per-step {options.seconds_per_step} has no effect: {_CHECKPOINT} saves by time or by "
                "epoch, not every so many steps; leave it out"
            )
        interval = timedelta(seconds=steps * options.seconds_per_step)
    if interval is not None and interval >= limit:
        raise SubmitError(
            f"a checkpoint every {interval} and --time {options.time}: a job that ends without a signal (a dead node) "
            "would have saved nothing; shorten the interval, or raise --time"
        )


def _check_requeue(trainer: Any) -> None:
    for plugin in _listed(trainer.plugins):
        if _class_path(plugin).endswith("SLURMEnvironment") and plugin.init_args.get("auto_requeue", True):
            raise SubmitError(
                "trainer.plugins has a SLURMEnvironment with auto_requeue on, but submit already requeues the job; set "
                "auto_requeue: false, or remove the plugin"
            )


def _check_resumption(settings: Any) -> None:
    if settings.ckpt_path not in (None, "last"):
        raise SubmitError(
            f"ckpt_path is {settings.ckpt_path}, but a job resumes from its own newest checkpoint; remove ckpt_path, "
            "and start from another adapter with trainer.strategy.init_args.adapter"
        )


def _check_paths(settings: Any, options: SubmitOptions) -> list[str]:
    """Raise SubmitError for a missing path and return warnings. Hub ids are not checked."""
    strategy = getattr(settings.trainer.strategy, "init_args", {})
    named = {
        "trainer.strategy.pretrained": strategy.get("pretrained"),
        "model.pretrained": module_settings(settings).get("pretrained"),
        "data.tokenizer": settings.data.get("tokenizer"),
        "data.train": settings.data.get("train"),
        "data.validation": settings.data.get("validation"),
        "data.test": settings.data.get("test"),
    }
    warnings = []
    for key, value in [(key, _path_of(part)) for key, given in named.items() for part in _listed(given)]:
        path = Path(str(value)).expanduser().absolute()
        text = str(value)
        looks_local = text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith(".jsonl")
        exists = path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None  # data may be a pattern
        if looks_local and not exists:
            raise SubmitError(f"{key}={value}: {path} does not exist; give a path that every node sees, or a hub id")
        if options.cluster == "slurm" and exists and _node_local(path):
            warnings.append(f"{key}={value} seems to be on a file system that other nodes cannot see")
    return sorted(set(warnings))


def _path_of(source: Any) -> Any:
    """The path or id of a source of data, which may have settings of its own."""
    return source.get("path") if isinstance(source, Mapping | Namespace) else source


def _check_root(root: Path, options: SubmitOptions) -> list[str]:
    check_line("trainer.default_root_dir", str(root))
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir():
        raise SubmitError(f"trainer.default_root_dir={root}: {existing} is not a directory; choose another path")
    if options.cluster == "slurm" and _node_local(existing):
        return [f"trainer.default_root_dir={root} seems to be on a file system that other nodes cannot see"]
    return []


def _node_local(path: Path) -> bool:
    return any(path.is_relative_to(prefix) for prefix in _NODE_LOCAL)


def _has_timeout(strategy: Any) -> bool:
    """Whether the strategy takes a timeout for collectives that the configuration leaves at its default."""
    return "timeout" in getattr(strategy, "init_args", {}) and strategy.init_args.timeout == timedelta(minutes=30)


def newest_step(root: Path) -> int | None:
    """The step from which a job in `root` would resume; None without a checkpoint in the default directory."""
    from lowrank_dist.checkpoints.layout import TrainingCheckpoint

    newest = newest_checkpoint(root / "checkpoints")
    try:
        return None if newest is None else int(TrainingCheckpoint(newest).manifest["step"])
    except CheckpointError:
        return None
