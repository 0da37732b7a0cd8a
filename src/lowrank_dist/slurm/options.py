"""What can be said about a job, and what of it is wrong by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from lowrank_dist.errors import InputError

Cluster = Literal["slurm", "local"]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_ADAPTER = "trainer.strategy.init_args.adapter.init_args"

#: Short names of what is swept most; the scaling alpha / r stays what it is in `rank`.
SWEEP_KEYS = {"lr": ("model.lr",), "rank": (f"{_ADAPTER}.r", f"{_ADAPTER}.lora_alpha")}


class SubmitError(InputError):
    """A job that would fail, or not do what is asked for."""


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """A job for ``lowrank-dist submit``.

    Attributes
    ----------
    config
        YAML files of ``lowrank-dist fit``, later ones over earlier ones.
    overrides
        Arguments of ``lowrank-dist fit`` after it, such as ``--model.lr=1e-4``.
    cluster
        ``slurm``; ``local``: the same job as processes of this machine.
    nodes, gpus_per_node
        Must be the configuration's ``num_nodes`` and ``devices`` where given: they fix the global batch.
    min_nodes
        Start, and start again after a requeue, on fewer nodes too; more batches are then accumulated for a step, so
        that it stays the same.
    time
        Limit, as SLURM writes it: ``MINUTES``, ``HH:MM:SS``, ``D-HH:MM:SS``, ...
    grace
        Seconds between SIGUSR2 and the end of the time: for a step and a save.
    collective_timeout
        Minutes after which a collective that hangs ends the job (DeepSpeedStrategy's ``timeout``).
    seconds_per_step
        If known: the checkpoint interval is compared with the time limit.
    sweep
        ``KEY=VALUE,VALUE,...``; a job array over all combinations. ``lr``, ``rank`` (with lora_alpha) or any key.
    array_parallelism
        Jobs of the array at a time.
    sbatch
        Any other option of sbatch, as ``NAME=VALUE``.
    setup
        Shell commands before the job (``module load ...``).
    """

    config: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    cluster: Cluster = "slurm"
    nodes: int | None = None
    min_nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    name: str | None = None
    time: str = "24:00:00"
    grace: int = 300
    collective_timeout: float = 15.0
    seconds_per_step: float | None = None
    sweep: tuple[str, ...] = ()
    array_parallelism: int = 8
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cluster not in get_args(Cluster):
            raise SubmitError(f"--cluster {self.cluster}: unknown; choose one of {', '.join(get_args(Cluster))}")
        for name in ("nodes", "min_nodes", "gpus_per_node", "cpus_per_task", "mem_gb", "grace", "collective_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SubmitError(f"--{name.replace('_', '-')} {value} must be positive")
        if self.grace > 65535:
            raise SubmitError(f"--grace {self.grace}: sbatch takes at most 65535 s")
        if self.grace >= 60 * self.minutes:
            raise SubmitError(
                f"--grace {self.grace} s is no shorter than --time {self.time} ({self.minutes} min): the job would be "
                "told to stop when it starts; give it more time, or a shorter grace period"
            )
        for option in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", option):
                raise SubmitError(f"--sbatch {option}: write NAME=VALUE, as in --sbatch reservation=my_reservation")
        _ = self.points

    @property
    def job_name(self) -> str:
        """What the job is called."""
        return self.name or "-".join(Path(path).stem for path in self.config)

    @property
    def minutes(self) -> int:
        """The time limit; seconds count as a minute, as for SLURM.

        Raises
        ------
        SubmitError
            Where `time` is not a time.
        """
        match = _TIME.fullmatch(self.time)
        if match is None:
            raise SubmitError(f"--time {self.time}: write MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
        fields = [int(field) for field in match["fields"].split(":")]
        if match["days"] is not None:
            hours, minutes, seconds = fields + [0] * (3 - len(fields))
        elif len(fields) == 3:
            hours, minutes, seconds = fields
        else:
            hours, (minutes, seconds) = 0, fields + [0] * (2 - len(fields))
        total = (int(match["days"] or 0) * 24 + hours) * 60 + minutes + (seconds > 0)
        if total == 0:
            raise SubmitError(f"--time {self.time}: that is no time at all")
        return total

    @property
    def points(self) -> list[dict[str, str]]:
        """The jobs of a sweep, each with what it is called by; one empty point where there is none."""
        axes = []
        for axis in self.sweep:
            key, _, values = axis.partition("=")
            if not key or not all(values.split(",")):
                raise SubmitError(f"--sweep {axis}: write KEY=VALUE,VALUE,..., as in --sweep rank=16,64")
            axes.append([(key, value) for value in values.split(",")])
        return [dict(point) for point in product(*axes)]


def point_overrides(point: dict[str, str]) -> list[str]:
    """Arguments of ``lowrank-dist fit`` for one point of a sweep."""
    return [f"--{key}={value}" for short, value in point.items() for key in SWEEP_KEYS.get(short, (short,))]
