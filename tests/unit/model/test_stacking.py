"""The layout of stacked experts' factors: what stock PEFT computes with them, and functions that undo each other."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.experts import peft_delta
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.model.stacking import (
    FactorReader,
    StackedFactors,
    concat_a,
    concat_b,
    join_a,
    join_b,
    positions,
    put_factor,
    split_a,
    split_b,
    stacked_shapes,
)

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Stack:
    """Factors of some experts: ``a`` ``[experts, r, in]``, ``b`` ``[experts, out, r]``, no two elements equal."""

    experts: int
    rank: int
    outputs: int
    inputs: int

    @property
    def a(self) -> Tensor:
        return torch.arange(self.experts * self.rank * self.inputs).view(self.experts, self.rank, self.inputs)

    @property
    def b(self) -> Tensor:
        return -1 - torch.arange(self.experts * self.rank * self.outputs).view(self.experts, self.outputs, self.rank)

    @property
    def each(self) -> dict[str, Tensor]:
        return {"lora_A": self.a, "lora_B": self.b}

    @property
    def joined(self) -> dict[str, Tensor]:
        return {"lora_A": join_a(self.a), "lora_B": join_b(self.b)}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A": (self.rank, self.inputs), "lora_B": (self.outputs, self.rank)}


stacks = st.builds(Stack, *[st.integers(1, 5)] * 2, *[st.integers(1, 7)] * 2)
world_sizes = st.integers(1, 9) | st.just(100)  # ranks that hold nothing, too


@given(stacks)
def test_what_is_joined_is_what_was_split(stack: Stack) -> None:
    a, b = stack.joined.values()
    assert torch.equal(split_a(a, stack.experts), stack.a)
    assert torch.equal(split_b(b, stack.experts), stack.b)
    assert torch.equal(join_a(split_a(a, stack.experts)), a)
    assert torch.equal(join_b(split_b(b, stack.experts)), b)
    assert {"lora_A": a.shape, "lora_B": b.shape} == stacked_shapes(stack.shapes, stack.experts)


@given(stacks)
def test_split_factors_are_views(stack: Stack) -> None:
    for whole, split in zip(stack.joined.values(), (split_a, split_b), strict=True):
        assert split(whole, stack.experts).data_ptr() == whole.data_ptr()


@given(stacks)
def test_rows_of_a_and_columns_of_b(stack: Stack) -> None:
    """The layout in words: row ``e r + j``, column ``j experts + e``."""
    a, b = stack.joined.values()
    for e in range(stack.experts):
        for j in range(stack.rank):
            assert torch.equal(a[e * stack.rank + j], stack.a[e, j])
            assert torch.equal(b[:, j * stack.experts + e], stack.b[e, :, j])


@given(stacks)
def test_positions_are_those_of_the_elements(stack: Stack) -> None:
    for factor, whole in stack.joined.items():
        taken = []
        for expert, one in enumerate(stack.each[factor]):
            where = positions(factor, one.numel(), expert, stack.experts)
            assert torch.equal(whole.flatten()[list(where)], one.flatten())
            taken += where
        assert sorted(taken) == list(range(whole.numel()))


@given(stacks, world_sizes, st.randoms(use_true_random=False))
def test_shards_filled_expert_by_expert_are_those_of_the_whole(
    stack: Stack, world_size: int, order: random.Random
) -> None:
    for factor, whole in stack.joined.items():
        experts = list(enumerate(stack.each[factor]))
        order.shuffle(experts)
        partition, shards = FlatPartition(numel=whole.numel(), world_size=world_size), []
        for rank in range(world_size):
            start, stop = partition.bounds(rank)
            shard = torch.full((stop - start,), 10**6)
            for expert, one in experts:
                put_factor(shard, start, one.flatten(), positions(factor, one.numel(), expert, stack.experts))
            shards.append(shard)
        assert torch.equal(torch.cat(shards), whole.flatten())


@given(stacks, world_sizes)
def test_shards_of_each_expert_are_read_out_of_the_whole(stack: Stack, world_size: int) -> None:
    """Every rank gets its flat shard of every expert, and the ranks together read every element once."""
    for factor, whole in stack.joined.items():
        one = FlatPartition(numel=stack.each[factor][0].numel(), world_size=world_size)
        read: list[int] = []

        def flat(name: str, start: int, stop: int, whole: Tensor = whole, read: list[int] = read) -> Tensor:
            assert name == "name"
            read += range(start, stop)
            return whole.flatten()[start:stop]

        for rank in range(world_size):
            reader, bounds = FactorReader(), slice(*one.bounds(rank))
            for expert, values in enumerate(stack.each[factor]):
                where = positions(factor, one.numel, expert, stack.experts)[bounds]
                assert torch.equal(reader.read(flat, "name", where), values.flatten()[bounds])
        assert sorted(read) == list(range(whole.numel()))


def test_what_was_read_for_one_tensor_is_not_taken_for_another() -> None:
    tensors = {"one": torch.arange(12), "other": -torch.arange(12)}
    reader, read = FactorReader(), []

    def flat(name: str, start: int, stop: int) -> Tensor:
        read.append((name, start, stop))
        return tensors[name][start:stop]

    for name, bounds in (("one", (0, 4)), ("other", (0, 4)), ("other", (2, 4)), ("one", (0, 4))):
        for expert in range(3):
            where = positions("lora_B", 4, expert, 3)[slice(*bounds)]
            assert torch.equal(reader.read(flat, name, where), tensors[name][list(where)])
    assert read == [("one", 0, 12), ("other", 0, 12), ("other", 6, 12), ("one", 0, 12)]
    reader.clear()
    reader.read(flat, "one", positions("lora_B", 4, 0, 3))
    assert len(read) == 5


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_pefts_delta_is_that_of_the_experts(experts: int) -> None:
    """Stock PEFT takes the stacked factors apart as the stack was joined; to the rounding of its own sums."""
    a, b = torch.randn(experts, 2, 5), torch.randn(experts, 7, 2)
    found = peft_delta(join_a(a), join_b(b), experts)
    torch.testing.assert_close(found.view(experts, 7, 5), b @ a)


def test_a_sum_of_loras_is_a_lora() -> None:
    """``[B | B'] [A; A'] = B A + B' A'`` for every expert, of ranks 2 and 3, as PEFT computes it."""
    pairs = [(torch.randn(3 * rank, 5), torch.randn(7, rank * 3)) for rank in (2, 3)]
    a, b = concat_a([a for a, _ in pairs], 3), concat_b([b for _, b in pairs])
    assert (a.shape, b.shape) == ((15, 5), (7, 15))
    torch.testing.assert_close(peft_delta(a, b, 3), sum(peft_delta(a, b, 3) for a, b in pairs))


@given(stacks)
def test_a_copy_is_filled_apart(stack: Stack) -> None:
    filled = StackedFactors(stack.shapes, stack.experts, ShardGroup.single(), torch.int64)
    for expert in range(stack.experts - 1):
        filled.put(expert, {factor: each[expert].flatten() for factor, each in stack.each.items()})
    if stack.experts > 1:
        before = {name: shard.clone() for name, shard in filled.shards.items()}
        copy = filled.copy()
        copy.put(stack.experts - 1, {factor: each[-1].flatten() for factor, each in stack.each.items()})
        assert all(torch.equal(filled.shards[factor], before[factor]) for factor in FACTORS)
        filled = copy
    else:
        filled.put(0, {factor: each[0].flatten() for factor, each in stack.each.items()})
    for factor, whole in stack.joined.items():
        assert torch.equal(filled.shards[factor], whole.flatten())
