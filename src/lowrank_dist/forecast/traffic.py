"""Bytes that one step communicates, within nodes and between them.

ZeRO-3 gathers every parameter for the forward and again for the backward (recomputation under gradient checkpointing
finds it gathered), and scatters sums of gradients, once for every batch that is accumulated. `live_layers` spares the
last layers the second gather; that is not counted. A ring over P ranks moves ``(P - 1) / P`` of the gathered bytes over
each of its links, one of which leads into every node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_dist.forecast.job import ModelShapes, Parameter, RunSpec, parameters

GATHERS = 2  # of every parameter, a batch


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What one step sends through collectives over the same number of ranks.

    Attributes
    ----------
    what
        ``gather`` or ``reduce``.
    ranks
        Of the group.
    nbytes
        Of the whole tensors, padding included, all batches of the step together.
    crosses
        Whether the group has ranks on more than one node.
    """

    what: str
    ranks: int
    nbytes: int
    crosses: bool

    @property
    def over_a_link(self) -> int:
        """Bytes that a ring sends over each of its links: from every rank, and into every node that it crosses."""
        return self.nbytes * (self.ranks - 1) // self.ranks


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a step."""

    collectives: tuple[Collective, ...]

    @property
    def per_rank(self) -> int:
        """Bytes that every rank sends to its neighbour, on its own node as a rule."""
        return sum(c.over_a_link for c in self.collectives)

    @property
    def into_node(self) -> int:
        """Bytes that come into every node from another one."""
        return sum(c.over_a_link for c in self.collectives if c.crosses)


def traffic(shapes: ModelShapes, job: RunSpec) -> Traffic:
    """What a step of `job` communicates."""
    every = list(parameters(shapes, job))
    trained = [p for p in every if p.kind == "trained"]
    found = []
    if job.stage == 3:
        for ranks in sorted({p.ranks for p in every}):
            nbytes = GATHERS * job.accumulate * sum(p.gathered_bytes for p in every if p.ranks == ranks)
            found.append(_collective("gather", ranks, nbytes, job))
        found.append(_collective("reduce", job.ranks, job.accumulate * _whole(trained), job))
    elif job.stage == 2:  # gradients of every batch to their owners, new parameters once
        found.append(_collective("reduce", job.ranks, job.accumulate * _whole(trained), job))
        found.append(_collective("gather", job.ranks, _whole(trained), job))
    else:  # an all-reduce is a reduce-scatter and a gather
        found += [_collective(what, job.ranks, _whole(trained), job) for what in ("reduce", "gather")]
    return Traffic(collectives=tuple(c for c in found if c.ranks > 1))


def _whole(parameters: Iterable[Parameter]) -> int:
    return sum(p.gathered_bytes for p in parameters)


def _collective(what: str, ranks: int, nbytes: int, job: RunSpec) -> Collective:
    return Collective(what=what, ranks=ranks, nbytes=nbytes, crosses=ranks > job.gpus_per_node)
