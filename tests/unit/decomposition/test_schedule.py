"""The planner's choices on machines made up for the purpose: what it must prefer, and what it must never do."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist import NF4, PiSSA
from lowrank_dist.decomposition.schedule import (
    MAX_BLOCK_BYTES,
    MAX_WAITING_BYTES,
    Machine,
    Sharding,
    candidates,
    measure,
    plan_schedule,
)
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.model.plan import PlannedMatrix


class Ranks(ShardGroup):
    """Rank 0 of a group that does not exist: only its size is asked for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def matrices(count: int, rows: int, columns: int, rank: int = 16) -> list[PlannedMatrix]:
    return [
        PlannedMatrix(
            layer=f"l{rows}.{i}", key=f"l{rows}.{i}.weight", rows=rows, columns=columns, input_first=False, rank=rank,
            scaling=1.0,
        )
        for i in range(count)
    ]  # fmt: skip


def machine(world_size: int, *, latency: float, bandwidth: float = 1e10, node: int = 1) -> Machine:
    sizes = [size for size in {world_size, node} if size > 1]
    within = {size: latency if size == world_size else 1e-5 for size in sizes}
    return Machine(flops=5e10, latency=within, bandwidth={size: bandwidth for size in sizes})


def sizes(planned: list[PlannedMatrix], world_size: int, made_up: Machine, **options: Any) -> dict[int, int]:
    """Matrices by the number of ranks that share them."""
    schedule = plan_schedule(planned, PiSSA(), NF4(), Ranks(world_size), machine=made_up, sharding=Sharding(**options))
    counts: dict[int, int] = {}
    for batch in schedule.batches:
        counts[batch.group_size] = counts.get(batch.group_size, 0) + len(batch.matrices)
    return counts


def test_large_matrices_on_a_fast_network_are_shared_by_all() -> None:
    assert sizes(matrices(8, 8192, 8192), 8, machine(8, latency=2e-5, bandwidth=1e11)) == {8: 8}


def test_small_matrices_on_a_slow_network_go_to_single_ranks() -> None:
    assert sizes(matrices(8, 256, 256), 8, machine(8, latency=1e-3)) == {1: 8}


def test_nodes_are_a_choice_where_the_network_between_them_is_slow() -> None:
    """A matrix too large for one rank: the ranks of a node share it."""
    rows = MAX_BLOCK_BYTES // 4 // 4096 * 4  # four times what one rank may hold
    planned = matrices(8, rows, 4096)
    assert sizes(planned, 16, machine(16, latency=10.0, node=8), ranks_per_node=8) == {8: 8}


def test_what_would_leave_ranks_idle_is_shared_by_all() -> None:
    assert sizes(matrices(9, 256, 256), 4, machine(4, latency=1e-3)) == {1: 8, 4: 1}


@settings(max_examples=50)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 8, 12]),
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    latency=st.floats(1e-6, 1.0),
    bandwidth=st.floats(1e6, 1e12),
)
def test_every_matrix_is_planned_once(world_size: int, counts: list[int], latency: float, bandwidth: float) -> None:
    planned = [m for i, count in enumerate(counts) for m in matrices(count, 64 * 8**i, 64 * 8**i)]
    made_up = machine(world_size, latency=latency, bandwidth=bandwidth)
    schedule = plan_schedule(planned, PiSSA(), NF4(), Ranks(world_size), machine=made_up)
    assert sorted(m.layer for batch in schedule.batches for m in batch.matrices) == sorted(m.layer for m in planned)
    for batch in schedule.batches:
        assert world_size % batch.group_size == 0
        turns = [batch.of_rank(rank, world_size) for rank in range(0, world_size, batch.group_size)]
        assert sorted(m.layer for mine in turns for m in mine) == sorted(m.layer for m in batch.matrices)
        assert 1 <= len(turns[0]) <= len(turns[-1]) + 1
        waiting = sum(m.rows * m.columns // 2 for m in turns[0]) // batch.group_size  # NF4
        assert len(turns[0]) == 1 or (batch.group_size < world_size and waiting <= MAX_WAITING_BYTES)
        for m in batch.matrices:
            shared = batch.group_size == world_size
            assert shared or -(-m.rows // batch.group_size) * m.columns * 4 <= MAX_BLOCK_BYTES


def test_a_choice_can_be_forced() -> None:
    assert sizes(matrices(4, 8192, 8192), 8, machine(8, latency=2e-5), ranks_per_matrix=2) == {2: 4}
    with pytest.raises(InputError, match=r"ranks_per_matrix=3 does not divide the 8 ranks.*1, 2, 4, 8"):
        sizes(matrices(4, 64, 64), 8, machine(8, latency=1.0), ranks_per_matrix=3)


def test_calibrated_methods_share_every_matrix() -> None:
    """Their statistics are cut for all ranks."""

    class Calibrated(PiSSA):
        statistic: ClassVar[Any] = "covariance"

    schedule = plan_schedule(matrices(4, 64, 64), Calibrated(), NF4(), Ranks(4), machine=machine(4, latency=1.0))
    assert {batch.group_size for batch in schedule.batches} == {4}


def test_the_choice_is_printed_with_its_reasons() -> None:
    schedule = plan_schedule(matrices(9, 256, 256), PiSSA(), NF4(), Ranks(4), machine=machine(4, latency=1e-3))
    text = str(schedule)
    assert "8 over 1 rank each, 1 over 4 ranks each" in text
    assert "all-reduce over 4 ranks 1000 us" in text
    assert "Gflop/s" in text


def test_one_rank_is_measured_without_a_network() -> None:
    found = measure(ShardGroup.single(), candidates(ShardGroup.single(), 1), torch.device("cpu"))
    assert found.flops > 1e8
    assert found.latency == {}
