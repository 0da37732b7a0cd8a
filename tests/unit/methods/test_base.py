"""What a method is given of a plan."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.methods import Matrix
from lowrank_dist.model.plan import PlannedMatrix


def test_a_matrix_says_what_its_plan_says() -> None:
    """Every attribute that both have, `name` apart: methods seed by the name in the checkpoint, which is the key."""
    planned = PlannedMatrix(
        layer="m.experts", key="key", rows=6, columns=4, input_first=True, rank=2, scaling=0.5, lookup=True,
        parameter="up", wrapped=True, expert=1, experts=3,
    )  # fmt: skip
    block, group = torch.randn(6, 4), ShardGroup.single()
    partition = planned.row_partition(1, block=64)
    matrix = Matrix.of(planned, block, group, partition=partition, factor_dtype=torch.bfloat16)
    shared = [field.name for field in fields(Matrix) if hasattr(planned, field.name)]
    assert {"rank", "scaling", "input_first", "lookup", "factor_names"} < set(shared)
    for name in set(shared) - {"name", "expert"}:
        assert getattr(matrix, name) == getattr(planned, name)
    assert (matrix.name, matrix.expert) == ("key", (1, 3))
    assert matrix.block is block
    assert (matrix.partition, matrix.group, matrix.factor_dtype) == (partition, group, torch.bfloat16)
    alone = replace(planned, expert=None, experts=1)
    assert Matrix.of(alone, block, group, partition=partition, factor_dtype=torch.float32).expert == (0, 1)
