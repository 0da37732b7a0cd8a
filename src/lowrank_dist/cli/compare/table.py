"""A comparison as text and as panels of a figure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lowrank_dist.cli.compare.groups import Comparison, Figure, Method
from lowrank_dist.cli.report_figure import MARKERS, STYLES, Panel
from lowrank_dist.progress import aligned
from lowrank_dist.storage.parse import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EDGE = "*"


def as_table(found: Comparison) -> str:
    """One line a method, the best first, and what is to be known of the figures."""
    rows = [_titles(found), *(_row(found, method) for method in found.methods)]
    keep = [index for index in range(len(rows[0])) if any(row[index] != "-" for row in rows[1:])]
    lines = aligned([[row[index] for index in keep] for row in rows], right=range(1, len(keep)))
    return "\n".join(printable(line, 10_000) for line in [*lines, *_notes(found)])


def _titles(found: Comparison) -> list[str]:
    time = "at equal time" if found.seconds is None else f"at {found.seconds:.3g} s"
    return [
        *("method", found.chosen.rpartition(".")[2], "tried", "runs", "loss at step 0", f"at step {found.step}", time),
        *found.tasks,
        *("init s", "train s", "memory GB", "trained", "adapter MB"),
    ]


def _row(found: Comparison, method: Method) -> list[str]:
    runs, at_time = method.runs, None
    if found.seconds is not None:
        at_time = found.loss(runs, seconds=found.seconds)
    return [
        method.name,
        method.best + _EDGE * method.is_at_an_edge,
        str(len(method.by_rate)),
        str(len(runs)),
        _figure(found.start(runs)),
        _figure(found.loss(runs)),
        _figure(at_time),
        *(_figure(found.score(runs, name)) for name in found.tasks),
        _number(Figure.of([run.init_seconds for run in runs]), ".1f"),
        _number(Figure.of([run.seconds for run in runs]), ".3g"),
        _number(Figure.of([run.memory_gb for run in runs]), ".2f"),
        _number(Figure.of([run.trained for run in runs]), ",.0f"),
        _number(Figure.of([None if run.adapter_bytes is None else run.adapter_bytes / 1e6 for run in runs]), ",.1f"),
    ]


def _notes(found: Comparison) -> Iterator[str]:
    yield ""
    yield (
        f"Validation losses; of every method the {found.setting} with the least mean loss at step {found.step}. "
        "Mean and sample standard deviation over seeds."
    )
    if any(method.is_at_an_edge for method in found.methods):
        yield f"{_EDGE} The least or the highest {found.value} that was tried: a better one may lie beyond."
    tried = {tuple(method.by_rate) for method in found.methods}
    if len(tried) > 1:
        yield f"The methods were not tried at the same {found.value}s: more {found.value}s are more chances."
    runs = {len(of_rate) for method in found.methods for of_rate in method.by_rate.values()}
    if len(runs) > 1:
        yield f"Not every {found.value} has the same number of runs."
    for name, reason in found.left_out.items():
        yield f"Left out: {name}: {reason}."


def _figure(value: Figure | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value.mean):
        return "diverged"
    return f"{value.mean:.4f}" + (f" ± {value.deviation:.4f}" if value.runs > 1 else "")


def _number(value: Figure | None, spec: str) -> str:
    return "-" if value is None else format(value.mean, spec)


def panels(found: Comparison) -> dict[str, Panel]:
    """Losses by step, by seconds and by the setting that is chosen."""
    shown = {f"validation loss, best {found.value} of each, step {found.step}": _curves(found, by_time=False)}
    if found.seconds is not None:
        shown["the same by seconds of training"] = _curves(found, by_time=True)
    if any(sum(map(_is_number, method.by_rate)) > 1 for method in found.methods):
        shown[f"validation loss at step {found.step} by {found.setting}"] = _rates(found)
    return shown


def _curves(found: Comparison, *, by_time: bool) -> Panel:
    def draw(axes: Axes) -> None:
        for index, method in enumerate(found.methods):
            points = defaultdict(list)
            for run in method.runs:
                for point in run.validation:
                    points[point.step].append((point.seconds if by_time else point.step, point.loss))
            whole = [at for at in points.values() if len(at) == len(method.runs)]
            places = [fmean(float(place or 0) for place, _ in at) for at in whole]
            losses = [[loss for _, loss in at] for at in whole]
            _line(axes, index, method.name, places, losses)
        axes.set_xlabel("seconds" if by_time else "optimizer step", fontsize=9)
        _finish(axes)

    return draw


def _rates(found: Comparison) -> Panel:
    def draw(axes: Axes) -> None:
        for index, method in enumerate(found.methods):
            rates = [rate for rate in method.by_rate if _is_number(rate)]
            losses = [
                [point.loss for run in method.by_rate[rate] for point in run.validation if point.step == found.step]
                for rate in rates
            ]
            _line(axes, index, method.name, [float(rate) for rate in rates], losses)
        axes.set_xscale("log")
        axes.set_xlabel(found.setting, fontsize=9)
        _finish(axes)

    return draw


def _line(axes: Axes, index: int, name: str, places: Sequence[float], losses: Sequence[Sequence[float]]) -> None:
    """The means, and a band from the least to the highest."""
    color = f"C{index % 10}"
    axes.plot(
        places,
        [fmean(at) for at in losses],
        label=name,
        color=color,
        linewidth=1.2,
        linestyle=STYLES[index % len(STYLES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
    )
    axes.fill_between(places, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.15)


def _finish(axes: Axes) -> None:
    axes.set_ylabel("nats per token", fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.15))


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
