"""Options of a job, and the checks that need no configuration."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from lowrank_dist.errors import InputError

Cluster = Literal["slurm", "local"]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ADAPTER = "trainer.strategy.init_args.adapter.init_args"

#: Short names of common sweep keys. `rank` sets r and lora_alpha alike, so that alpha / r is 1 at every point.
SWEEP_KEYS = {
    "lr": ("model.lr",),
    "rank": (f"{_ADAPTER}.r", f"{_ADAPTER}.lora_alpha"),
    "seed": ("seed_everything",),
}
#: The key of a sweep whose values are configuration files, each after those of all points.
FILES = "config"
#: Keys that submit sets by itself for every point of a sweep.
_OWN = {
    "trainer.default_root_dir": "every point has a directory of its own below it",
    "trainer.logger.save_dir": "every point has a directory of its own below trainer.default_root_dir",
    "ckpt_path": "every point resumes from its own newest checkpoint",
}

DEFAULT_TIMEOUT = 15.0  # minutes

_POSITIVE = (
    *("nodes", "min_nodes", "gpus_per_node", "cpus_per_task", "mem_gb"),
    *("grace", "collective_timeout", "seconds_per_step", "array_parallelism"),
)
#: Options of sbatch, which a job on this machine does without.
_OF_SLURM = ("partition", "account", "qos", "constraint", "exclude", "cpus_per_task", "mem_gb", "sbatch")


class SubmitError(InputError):
    """A job that would fail, or would not do what the user requested."""


def check_line(name: str, text: str) -> None:
    """Raise SubmitError if `text`, the value of `name`, has a control character."""
    if (bad := _CONTROL.search(text)) is not None:
        raise SubmitError(
            f"{name} {text!r}: has the control character {bad[0]!r}, which a line of the script for sbatch cannot "
            "hold; remove it"
        )


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """A job for ``lowrank-dist submit``.

    Attributes
    ----------
    config
        YAML files of ``lowrank-dist fit``; later files override earlier ones.
    overrides
        Further arguments of ``lowrank-dist fit``, such as ``--model.lr=1e-4``.
    cluster
        ``slurm``, or ``local`` to run the same job as processes on this machine.
    nodes, gpus_per_node
        If given, they must equal the configuration's ``num_nodes`` and ``devices``, which fix the global batch.
    min_nodes
        Smallest number of nodes on which the job may start, also after a requeue. On fewer nodes each rank accumulates
        more batches, so that the global batch stays the same.
    cpus_per_task, mem_gb
        CPU cores of a rank; memory of a node in GB.
    partition, account, qos, constraint, exclude
        Options of sbatch with the same names.
    name
        Name of the job. None: the names of the configuration files.
    time
        Time limit in SLURM's notation: ``MINUTES``, ``HH:MM:SS``, ``D-HH:MM:SS``, ...
    grace
        Seconds between SIGUSR2 and the time limit; a step and a save must fit into them.
    collective_timeout
        Minutes after which a hanging collective ends the job (DeepSpeedStrategy's ``timeout``).
    seconds_per_step
        Seconds of one step, if known; used to compare the checkpoint interval with the time limit.
    sweep
        ``KEY=VALUE,VALUE,...`` for a job array over all combinations. The key is ``lr``, ``rank`` (which also sets
        lora_alpha), ``seed``, ``config`` (files over those of `config`, such as one a method) or any key of the
        configuration.
    array_parallelism
        Largest number of jobs of the array that run at the same time. None: 8, and 1 with ``cluster="local"``.
    sbatch
        Any other option of sbatch, as ``NAME=VALUE``.
    setup
        Shell commands that run before the job (``module load ...``).
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
    collective_timeout: float = DEFAULT_TIMEOUT
    seconds_per_step: float | None = None
    sweep: tuple[str, ...] = ()
    array_parallelism: int | None = None
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_lines()
        if self.cluster not in get_args(Cluster):
            raise SubmitError(f"--cluster {self.cluster}: unknown; choose one of {', '.join(get_args(Cluster))}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SubmitError(f"{_option(name)} {value} must be positive")
        if self.grace > 65535:
            raise SubmitError(f"--grace {self.grace}: sbatch takes at most 65535 s")
        if self.grace >= 60 * self.minutes:
            raise SubmitError(
                f"--grace {self.grace} s must be shorter than --time {self.time} ({self.minutes} min), or the signal "
                "to stop would arrive at the start; raise --time or lower --grace"
            )
        for option in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", option):
                raise SubmitError(f"--sbatch {option}: write NAME=VALUE, as in --sbatch reservation=my_reservation")
        self._check_used()
        self._check_keys()
        _ = self.points

    def _check_used(self) -> None:
        """Raise SubmitError for an option that would have no effect."""
        if self.cluster == "local" and (name := next(filter(partial(getattr, self), _OF_SLURM), None)) is not None:
            raise SubmitError(f"{_option(name)} has no effect with --cluster local; leave it out")
        if self.array_parallelism is not None and not self.sweep:
            raise SubmitError(
                f"--array-parallelism {self.array_parallelism} has no effect without --sweep; leave it out"
            )

    def _check_keys(self) -> None:
        """Raise SubmitError if a key of the sweep is set a second time, so that one of its values would be lost."""
        given = {_without_classes(key): f"--{key}" for key in map(_key_of, self.overrides) if key}
        for axis in self.sweep:
            key = axis.partition("=")[0]
            of_axis = [_without_classes(name) for name in SWEEP_KEYS.get(key, (key,))]
            for name in of_axis:
                if name in _OWN:
                    raise SubmitError(f"--sweep {axis}: {_OWN[name]}; leave it out")
                for earlier, option in given.items():
                    if earlier == name or earlier.startswith(f"{name}."):
                        raise SubmitError(f"--sweep {axis}: it would replace what {option} sets; give each key once")
            given |= dict.fromkeys(of_axis, f"--sweep {axis}")

    def _check_lines(self) -> None:
        """Raise SubmitError if a value would add a line to the script of the job, or hide part of one."""
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    check_line(_option(field.name), text)

    @property
    def job_name(self) -> str:
        """Name of the job."""
        return self.name or "-".join(Path(path).stem for path in self.config)

    @property
    def minutes(self) -> int:
        """The time limit in minutes; seconds are rounded up to a minute, as SLURM does.

        Raises
        ------
        SubmitError
            If `time` is not in SLURM's notation or is zero.
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
            raise SubmitError(f"--time {self.time} must be positive")
        return total

    @property
    def parallelism(self) -> int:
        """Jobs of the array at the same time."""
        return self.array_parallelism or (1 if self.cluster == "local" else 8)

    @property
    def points(self) -> list[dict[str, str]]:
        """Points of the sweep as mappings from key to value; a single empty mapping without a sweep."""
        axes = []
        for axis in self.sweep:
            key, _, values = axis.partition("=")
            if not key or not all(values.split(",")):
                raise SubmitError(f"--sweep {axis}: write KEY=VALUE,VALUE,..., as in --sweep rank=16,64")
            axes.append([(key, value) for value in values.split(",")])
        return [dict(point) for point in product(*axes)]


def _option(name: str) -> str:
    """The option of the command line that sets a field."""
    return f"--{name.replace('_', '-')}"


def _key_of(argument: str) -> str:
    """The key of ``--key=value``, ``--key+=value`` or ``--key``; empty for a value that stands by itself."""
    return argument[2:].partition("=")[0].removesuffix("+") if argument.startswith("--") else ""


def _without_classes(key: str) -> str:
    """A key as the parser of ``fit`` takes it too: arguments of a class directly below the class."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def point_overrides(point: dict[str, str]) -> list[str]:
    """Arguments of ``lowrank-dist fit`` for one point of a sweep, beside its files."""
    return [
        f"--{key}={value}"
        for short, value in point.items()
        if short != FILES
        for key in SWEEP_KEYS.get(short, (short,))
    ]
