"""The health check names the node that is not fit: here ranks that say they are nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import alone, run_ranks
from lowrank_dist.cluster import health
from lowrank_dist.cluster.health import HealthReport, check_health
from lowrank_dist.distributed.group import ShardGroup


@alone
def check(directory: Path, hosts: list[str], fault: str | None) -> HealthReport:
    """The report, with a fault on the last rank."""
    rank = dist.get_rank()
    if rank == dist.get_world_size() - 1:
        if fault == "other directory":
            directory = directory / "not shared"
        if fault == "other version":
            real = health.version
            health.version = lambda package: "0.0" if package == "peft" else real(package)
    health.VISIBLE = 1.0
    return check_health(ShardGroup(), torch.device("cpu"), directory, host=hosts[rank])


def test_healthy_nodes(tmp_path: Path) -> None:
    reports = run_ranks(4, check, tmp_path / "new", ["a", "a", "b", "b"], None)
    assert all(report.problems == () for report in reports)
    assert len({str(report) for report in reports}) == 1
    a, b = reports[0].nodes
    assert (a.host, a.ranks, b.host, b.ranks) == ("a", 2, "b", 2)
    assert min(a.within, b.within, a.between, b.between) > 0
    assert a.free_bytes > 0
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [("other directory", "c does not see the checkpoint directory"), ("other version", "c: peft 0.0, elsewhere")],
)
def test_the_node_at_fault_is_named(tmp_path: Path, fault: str, message: str) -> None:
    for report in run_ranks(3, check, tmp_path, ["a", "b", "c"], fault):
        (problem,) = report.problems
        assert problem.startswith(message)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for report in run_ranks(2, check, tmp_path / "file", ["a", "b"], None):
        assert "a cannot write to the checkpoint directory" in report.problems[0]
