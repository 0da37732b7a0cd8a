"""Runs by method and learning rate: which rate is the best of a method, and what its runs reached."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lowrank_dist.cli.compare.runs import Run
from lowrank_dist.cli.compare.settings import names
from lowrank_dist.errors import InputError

#: The setting that is chosen unless another one is named.
RATE = "model.lr"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean over runs, with their sample standard deviation (0 of one run)."""

    mean: float
    deviation: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Figure | None:
        """Of those that are known; None of none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 and all(map(math.isfinite, known)) else 0.0
        return cls(mean=statistics.fmean(known), deviation=deviation, runs=len(known))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs of the same settings but for the learning rate and the seed.

    Attributes
    ----------
    name
        What tells it from the others.
    by_rate
        Its runs by learning rate, in ascending order.
    best
        The rate whose runs have the least mean loss.
    """

    name: str
    by_rate: dict[str, list[Run]]
    best: str

    @property
    def runs(self) -> list[Run]:
        """Those of the best rate."""
        return self.by_rate[self.best]

    @property
    def is_at_an_edge(self) -> bool:
        """Whether the best rate is the least or the highest of several numbers: a better one may lie beyond."""
        rates = list(self.by_rate)
        numbers = all(math.isfinite(_number(rate)[0]) for rate in rates)
        return numbers and len(rates) > 1 and self.best in (rates[0], rates[-1])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods at equal steps and at equal time.

    Attributes
    ----------
    methods
        Those with the least loss first.
    step
        The last step.
    seconds
        Training time in which the runs of the fastest method had all ended, validations apart; None if it is not known
        of all runs.
    left_out
        Runs that are not compared, with the reason.
    chosen
        Key of the setting of which every method has its best value.
    """

    methods: list[Method]
    step: int
    seconds: float | None
    left_out: dict[str, str]
    chosen: str = RATE

    @property
    def setting(self) -> str:
        """What is chosen, in words."""
        return _in_words(self.chosen)

    @property
    def value(self) -> str:
        """What one of its values is called."""
        return "rate" if self.chosen == RATE else "value"

    def loss(self, runs: Sequence[Run], *, seconds: float | None = None) -> Figure | None:
        """Loss of the last validation, or of the last one up to a time."""
        return Figure.of([_reached(run, seconds) for run in runs])

    @property
    def tasks(self) -> list[str]:
        """Names of scores that any run has."""
        runs = (run for method in self.methods for run in method.runs)
        return sorted({name for run in runs for name in run.scores})

    def score(self, runs: Sequence[Run], name: str) -> Figure | None:
        """The last score of this name, of runs that have it."""
        return Figure.of([run.scores.get(name) for run in runs])

    def start(self, runs: Sequence[Run]) -> Figure | None:
        """Validation loss before the first step, of runs that validated then."""
        return Figure.of([next((p.loss for p in run.validation if p.step == 0), None) for run in runs])


def compare(runs: Sequence[Run], *, rate: str = RATE) -> Comparison:
    """Group runs, choose every method's best learning rate, and leave out what cannot be compared.

    Parameters
    ----------
    runs
        From `find_runs`.
    rate
        Key of the setting that is chosen per method. Other than `RATE`, a run must have it.

    Raises
    ------
    InputError
        If no run is left, no run has the setting, or runs of one method, rate and seed are more than one.
    """
    ends = Counter(run.last_step for run in runs)
    last = max(ends, key=lambda step: (ends[step], step), default=0)  # where most ended
    left_out = {}
    for run in runs:
        if run.last_step != last:
            left_out[str(run.directory)] = f"ended at step {run.last_step}, the others at step {last}"
        elif not any(point.step == last for point in run.validation):
            left_out[str(run.directory)] = f"has no validation loss at step {last}"
    kept = [run for run in runs if str(run.directory) not in left_out]
    if not kept:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        raise InputError(f"no run has a validation loss at its last step; set trainer.val_check_interval{listed}")
    rate = ".".join(part for part in rate.split(".") if part != "init_args")  # as `flat` names it
    if rate != RATE:
        _check_known(rate, kept)
    groups: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run, name in zip(kept, names([run.settings for run in kept], without=rate), strict=True):
        groups[name][run.settings.get(rate, "none")].append(run)
    methods = []
    for name, by_rate in groups.items():
        _check_seeds(name, _in_words(rate), by_rate)
        by_rate = {key: by_rate[key] for key in sorted(by_rate, key=_number)}
        best = min(by_rate, key=lambda key: _mean_loss(by_rate[key]))
        methods.append(Method(name=name, by_rate=by_rate, best=best))
    methods.sort(key=lambda method: _mean_loss(method.runs))
    times = [[run.seconds for run in method.runs] for method in methods]
    known = [[time for time in of_method if time is not None] for of_method in times]
    seconds = min(map(max, known)) if known == times else None
    return Comparison(methods=methods, step=last, seconds=seconds, left_out=left_out, chosen=rate)


def _in_words(key: str) -> str:
    return "learning rate" if key == RATE else key


def _check_known(key: str, runs: Sequence[Run]) -> None:
    keys = sorted({key for run in runs for key in run.settings})
    if key not in keys:
        end = key.rpartition(".")[2]
        alike = [other for other in keys if other.rpartition(".")[2] == end] or get_close_matches(key, keys, cutoff=0)
        raise InputError(f"--choose {key}: no run has this setting; do you mean {' or '.join(alike[:3])}?")


def _check_seeds(name: str, setting: str, by_rate: dict[str, list[Run]]) -> None:
    for rate, runs in by_rate.items():
        seeds = Counter(run.seed for run in runs)
        if (twice := next((seed for seed, count in seeds.items() if count > 1), None)) is not None:
            listed = "".join(f"\n  {run.directory}" for run in runs if run.seed == twice)
            raise InputError(
                f"{seeds[twice]} runs of {name}, {setting} {rate}, have seed {twice}: they are one run done "
                f"twice; pass one of them{listed}"
            )


def _reached(run: Run, seconds: float | None) -> float | None:
    points = [
        point for point in run.validation if seconds is None or (point.seconds is not None and point.seconds <= seconds)
    ]
    return max(points, key=lambda point: point.step).loss if points else None


def _mean_loss(runs: Sequence[Run]) -> float:
    """Of the last validations; infinite if a run diverged, which is the worst."""
    found = Figure.of([_reached(run, None) for run in runs])
    return math.inf if found is None or not math.isfinite(found.mean) else found.mean


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def as_dict(found: Comparison) -> dict[str, Any]:
    """The figures, for JSON. Losses that are not finite are None."""

    def figure(value: Figure | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {"mean": _finite(value.mean), "deviation": _finite(value.deviation), "runs": value.runs}

    methods = []
    for method in found.methods:
        runs = method.runs
        at_time = None if found.seconds is None else found.loss(runs, seconds=found.seconds)
        methods.append(
            {
                "name": method.name,
                "best": method.best,
                "is_at_an_edge": method.is_at_an_edge,
                "by_value": {rate: figure(found.loss(of_rate)) for rate, of_rate in method.by_rate.items()},
                "loss_at_step_0": figure(found.start(runs)),
                "loss": figure(found.loss(runs)),
                "loss_at_equal_time": figure(at_time),
                "init_seconds": figure(Figure.of([run.init_seconds for run in runs])),
                "train_seconds": figure(Figure.of([run.seconds for run in runs])),
                "memory_gb": figure(Figure.of([run.memory_gb for run in runs])),
                "adapter_bytes": figure(Figure.of([run.adapter_bytes for run in runs])),
                "trained_parameters": figure(Figure.of([run.trained for run in runs])),
                "scores": {name: figure(found.score(runs, name)) for name in found.tasks},
                "runs": [str(run.directory) for run in runs],
            }
        )
    return {
        "chosen": found.chosen,
        "step": found.step,
        "seconds": found.seconds,
        "methods": methods,
        "left_out": found.left_out,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
