"""How many batches are accumulated on so many nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.slurm import SubmitError
from lowrank_dist.slurm.checks import accumulated


@given(batches=st.integers(1, 512), nodes=st.integers(1, 16), devices=st.integers(1, 8))
def test_the_global_batch_stays_the_same(batches: int, nodes: int, devices: int) -> None:
    try:
        assert accumulated(batches=batches, nodes=nodes, devices=devices) * nodes * devices == batches
    except SubmitError:
        assert batches % (nodes * devices)
