"""Which nodes are slower than the others."""

from __future__ import annotations

from lowrank_dist.cluster.health import NodeHealth, slow_nodes


def node(host: str, within: float | None, between: float | None) -> NodeHealth:
    return NodeHealth(host=host, ranks=8, free_bytes=1, within=within, between=between)


def test_slow_nodes_are_named_not_their_neighbours() -> None:
    # between[i] is of nodes i and i + 1: c is slow, so b-c and c-d are
    nodes = [node("a", 9, 5), node("b", 9, 1), node("c", 2, 1), node("d", 9, 5), node("e", 9, 5)]
    assert [line.split(":")[0] for line in slow_nodes(nodes)] == ["c", "c"]
    assert slow_nodes(nodes[:2]) == []  # two cannot be told apart
