"""Several sources in one set: the parts that a user names, and how many examples an epoch draws from each by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from lowrank_dist.data.sources import Source
from lowrank_dist.errors import InputError

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]
"""When an epoch of weighted sources ends, by the names of ``datasets.interleave_datasets``."""


class _Path(TypedDict):
    path: str | list[str]


class SourceEntry(_Path, total=False):
    """One of several sources, with options of its own."""

    weight: float
    split: str
    subset: str
    limit: int


Names = str | list[str] | list[str | SourceEntry]
"""What names the records of a set."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A source of a set.

    Attributes
    ----------
    source
        Where its records come from.
    limit
        Number of records that are read. None: all.
    weight
        Its share, relative to those of the other parts. None: parts have none.
    """

    source: Source
    limit: int | None
    weight: float | None = None


def parts_of(role: str, names: Names, *, split: str, subset: str | None, limit: int | None) -> tuple[Part, ...]:
    """The parts of a set: one if only names are given, else one for each entry.

    Parameters
    ----------
    role
        Option that names them; only those of ``"train"`` may have weights.
    names
        A path, pattern or hub id, a list of these, or a list of `SourceEntry`.
    split, subset, limit
        For entries that have none of their own; `limit` only where there are no entries.

    Raises
    ------
    InputError
        If an entry or its weight is not valid; the message names it.
    """
    if isinstance(names, str) or all(isinstance(name, str) for name in names):
        plain: Any = names
        return (Part(source=Source(role=role, names=plain, split=split, subset=subset), limit=limit),)
    if limit is not None:
        option = "limit" if role == "train" else "eval_limit"
        raise InputError(
            f"{option}={limit} does not say from which entries of `{role}` records are read; give entries a `limit` "
            "of their own"
        )
    parts = tuple(_part(f"{role}[{index}]", entry, split, subset) for index, entry in enumerate(names))
    weighted = [part for part in parts if part.weight is not None]
    if weighted and role != "train":
        raise InputError(
            f"{weighted[0].source.role}.weight={weighted[0].weight}: in `{role}` every example counts once; leave the "
            "weight out"
        )
    if weighted and len(weighted) < len(parts):
        lacking = next(part for part in parts if part.weight is None)
        raise InputError(
            f"{lacking.source} has no weight, and {weighted[0].source} has the weight {weighted[0].weight:g}; give all "
            "of them a weight, or none"
        )
    return parts


def _part(role: str, entry: Any, split: str, subset: str | None) -> Part:
    if isinstance(entry, str):
        entry = {"path": entry}
    known = SourceEntry.__annotations__
    if not isinstance(entry, Mapping) or entry.get("path") is None:
        raise InputError(f"{role}={entry!r}: neither a name nor an entry with a `path`")
    if odd := [name for name in entry if name not in known]:
        raise InputError(f"{role}: {odd[0]!r} is not known; valid choices: {', '.join(known)}")
    limit, weight = entry.get("limit"), entry.get("weight")
    if limit is not None and limit < 1:
        raise InputError(f"{role}.limit={limit} must be at least 1")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf
    ):
        raise InputError(f"{role}.weight={weight!r} must be a number above 0; leave the source out to read nothing")
    source = Source(
        role=role, names=entry["path"], split=entry.get("split") or split, subset=entry.get("subset") or subset
    )
    return Part(source=source, limit=limit, weight=None if weight is None else float(weight))


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Weights of the parts of a set.

    Attributes
    ----------
    parts
        What the parts are called, with their weights.
    strategy
        When an epoch ends.
    """

    parts: Sequence[tuple[str, float]]
    strategy: StoppingStrategy = "first_exhausted"

    @classmethod
    def of(cls, parts: Sequence[Part], strategy: StoppingStrategy) -> Mixing | None:
        """That of parts; None if they have no weights, or there is only one.

        Raises
        ------
        InputError
            If `strategy` is not known.
        """
        if strategy not in get_args(StoppingStrategy):
            raise InputError(f"stopping_strategy={strategy!r}; valid choices: {', '.join(get_args(StoppingStrategy))}")
        weighted = [(str(part.source), part.weight) for part in parts if part.weight is not None]
        return cls(parts=weighted, strategy=strategy) if len(weighted) > 1 else None

    def over(self, sizes: Sequence[int], *, seed: int, unit: str) -> Mixture:
        """The mixture of so many units of each part, such as examples.

        Raises
        ------
        InputError
            If an epoch would have no unit of a part.
        """
        made = Mixture(sizes=tuple(sizes), mixing=self, seed=seed, unit=unit)
        for (name, weight), count in zip(self.parts, made.counts, strict=True):
            if count == 0:
                raise InputError(
                    f"{name}: with the weight {weight:g} its share of an epoch of {made.total} {unit} is less than "
                    f"half of one; raise it, or set stopping_strategy='all_exhausted'"
                )
        return made


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What every epoch draws from parts of the given sizes. Shares are exact up to rounding to whole units.

    With ``"first_exhausted"`` an epoch has each unit of one part once and fewer of the others, with ``"all_exhausted"``
    it has every unit of all parts, some several times. Each part is passed through in one random order after the other,
    and an epoch goes on where the last one ended: no unit comes again before all others of its part have come.
    """

    sizes: tuple[int, ...]
    mixing: Mixing
    seed: int
    unit: str

    @cached_property
    def counts(self) -> list[int]:
        """Units of each part in an epoch."""
        weights = [Fraction(weight) for _, weight in self.mixing.parts]
        passes = [size / weight for size, weight in zip(self.sizes, weights, strict=True)]
        length = min(passes) if self.mixing.strategy == "first_exhausted" else max(passes)
        return [round(length * weight) for weight in weights]

    @property
    def total(self) -> int:
        """Units in an epoch."""
        return sum(self.counts)

    def drawn(self, epoch: int) -> Tensor:
        """The units of an epoch, part after part: int64 ``[total]``; units are counted through all parts."""
        drawn, first = [], 0
        for part, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            at, end = epoch * count, (epoch + 1) * count
            while at < end:
                number, begin = divmod(at, size)
                taken = self._order(part, number)[begin : begin + end - at]
                drawn.append(taken + first)
                at += len(taken)
            first += size
        return torch.cat(drawn)

    def _order(self, part: int, number: int) -> Tensor:
        """The order of pass `number` through a part."""
        digest = hashlib.sha256(f"{self.seed} {part} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(self.sizes[part], generator=generator)

    def line(self) -> str:
        """What is drawn, in one line."""
        shares = ", ".join(
            f"{count} of the {size} of {name} ({count / self.total:.2%})"
            for (name, _), size, count in zip(self.mixing.parts, self.sizes, self.counts, strict=True)
        )
        return f"{self.total} {self.unit} an epoch, by weight ({self.mixing.strategy}): {shares}"
