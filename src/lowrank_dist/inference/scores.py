"""What lm-evaluation-harness writes of a task, as figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowrank_dist.storage.parse import is_figure

Measured = tuple[str, str, float, float | None]
"""A metric, the filter of answers that it is of, its value, and its standard error if there is one."""


def measured(metrics: Mapping[str, Any]) -> Iterator[Measured]:
    """The figures of a task; other entries (its alias, texts) are left out.

    Parameters
    ----------
    metrics
        Entries as the harness names them: ``metric,filter`` and ``metric_stderr,filter``.
    """
    for name, value in metrics.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and is_figure(value):
            error = metrics.get(f"{metric}_stderr,{kind}")
            yield metric, kind, float(value), float(error) if error is not None and is_figure(error) else None
