"""Combinations of parameters: `make test` runs as many as cover the values, `make test-matrix` all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest


def covering(
    strength: int, axes: Mapping[str | tuple[str, ...], Iterable[Any]], *, ids: Callable[[Any], str] | None = None
) -> pytest.MarkDecorator:
    """Parametrize with the product of `axes`; combinations beyond a cover of `strength` get the marker ``matrix``.

    In a cover of strength 1 every value of every axis occurs, in one of strength 2 every pair of values of two axes.
    Axes are values by the name of an argument, or tuples of values by the names of several.
    """
    names = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)]
    values = [[(one,) if isinstance(axis, str) else tuple(one) for one in found] for axis, found in axes.items()]
    every = list(product(*(range(len(axis)) for axis in values)))
    chosen = _cover(every, strength)
    marked = [
        pytest.param(
            *(value for axis, index in zip(values, case, strict=True) for value in axis[index]),
            marks=() if case in chosen else pytest.mark.matrix,
        )
        for case in every
    ]
    return pytest.mark.parametrize(names, marked, ids=ids)


def _cover(every: list[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    """Greedily: the one that covers most of what is missing, and of those the first with the values chosen least."""

    def covers(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), min(strength, len(case))))

    missing, chosen = set().union(*map(covers, every)), set[tuple[int, ...]]()
    uses = Counter[tuple[int, int]]()
    while missing:
        best = max(every, key=lambda case: (len(covers(case) & missing), -sum(uses[one] for one in enumerate(case))))
        chosen.add(best)
        uses.update(enumerate(best))
        missing -= covers(best)
    return chosen
