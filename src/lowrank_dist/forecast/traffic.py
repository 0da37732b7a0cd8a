"""Bytes that one step communicates, within nodes and between them.

For every accumulated batch, ZeRO-3 gathers parameters for the forward and again for the backward, and reduce-scatters
gradients. Recomputation under gradient checkpointing finds the parameters gathered. Two modules are gathered once: a
frozen embedding, which needs no weight in its backward, and the head, which is the last in the forward and the first in
the backward. A ring over P ranks moves ``(P - 1) / P`` of the gathered bytes over each of its links, one of which leads
into every node.

If every rank holds all frozen parameters, trained ones are gathered once a step and stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_dist.forecast.job import ModelShapes, Parameter, RunSpec, parameters


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
        once = gathered_once(shapes, trained)
        for ranks in sorted({p.ranks for p in every}):
            gathered = [p for p in every if p.ranks == ranks]
            nbytes = sum(p.gathered_bytes for p in gathered)
            if not job.keeps_trained:
                spared = sum(p.gathered_bytes for p in gathered if any(_within(p.name, module) for module in once))
                nbytes = job.accumulate * (2 * nbytes - spared)
            found.append(_collective("gather", ranks, nbytes, job))
        found.append(_collective("reduce", job.ranks, job.accumulate * _whole(trained), job))
    elif job.stage == 2:  # gradients of every batch to their owners, new parameters once
        found.append(_collective("reduce", job.ranks, job.accumulate * _whole(trained), job))
        found.append(_collective("gather", job.ranks, _whole(trained), job))
    else:  # an all-reduce is a reduce-scatter and a gather
        found += [_collective(what, job.ranks, _whole(trained), job) for what in ("reduce", "gather")]
    return Traffic(collectives=tuple(c for c in found if c.ranks > 1))


def gathered_once(shapes: ModelShapes, trained: Iterable[Parameter]) -> list[str]:
    """Names of the modules whose parameters are gathered once a batch."""
    backbone = shapes.backbone
    if any(len(tensor.names) > 1 for tensor in shapes.plan.parameters):  # tied: for the lookup, and for the head
        return []
    names = {module: name for name, module in backbone.named_modules()}
    embedding, head = (names.get(m) for m in (backbone.get_input_embeddings(), backbone.get_output_embeddings()))
    once = [] if head is None else [head]
    if embedding is not None and not any(_within(parameter.name, embedding) for parameter in trained):
        once.append(embedding)
    return once


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _whole(parameters: Iterable[Parameter]) -> int:
    return sum(p.whole_bytes for p in parameters)


def _collective(what: str, ranks: int, nbytes: int, job: RunSpec) -> Collective:
    return Collective(what=what, ranks=ranks, nbytes=nbytes, crosses=ranks > job.gpus_per_node)
