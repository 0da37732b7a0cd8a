"""Bytes that one step communicates, within nodes and between them.

ZeRO-3 gathers every parameter for the forward and again for the backward, and reduce-scatters gradients, once for every
accumulated batch. Recomputation under gradient checkpointing finds the parameters gathered. `live_layers` saves the
second gather of the last layers; this is not counted. A ring over P ranks moves ``(P - 1) / P`` of the gathered bytes
over each of its links, one of which leads into every node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_dist.forecast.job import ModelShapes, Parameter, RunSpec, parameters

GATHERS = 2  # of every parameter per batch


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in one step, over the same number of ranks.

    Attributes
    ----------
    what
        ``gather`` or ``reduce``.
    ranks
        Number of ranks in the group.
    nbytes
        Bytes of the whole tensors, padding included, of all batches of the step together.
    crosses
        Whether the group has ranks on more than one node.
    """

    what: str
    ranks: int
    nbytes: int
    crosses: bool

    @property
    def over_a_link(self) -> int:
        """Bytes that a ring sends over each of its links: from every rank, and into every node of the ring."""
        return self.nbytes * (self.ranks - 1) // self.ranks


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a step."""

    collectives: tuple[Collective, ...]

    @property
    def per_rank(self) -> int:
        """Bytes that every rank sends to its neighbour, which is usually on the same node."""
        return sum(c.over_a_link for c in self.collectives)

    @property
    def into_node(self) -> int:
        """Bytes that every node receives from another node."""
        return sum(c.over_a_link for c in self.collectives if c.crosses)


def traffic(shapes: ModelShapes, job: RunSpec) -> Traffic:
    """Collectives of one step of `job`."""
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
