"""Which rank sees which item, also where an epoch goes on elsewhere."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.ranks import run_ranks
from lowrank_dist.data.packing import Collator, TokenDataset
from lowrank_dist.data.sampler import ResumableLoader, ShardedSampler
from lowrank_dist.data.token_batches import TokenBatchSampler
from lowrank_dist.errors import InputError


def dataset_of(sizes):
    return TokenDataset([torch.full((2, size), index, dtype=torch.int32) for index, size in enumerate(sizes)])


def samplers(dataset, ranks, batch_size, **settings):
    return [
        ShardedSampler(dataset, batch_size=batch_size, num_replicas=ranks, rank=rank, **settings)
        for rank in range(ranks)
    ]


counts = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))  # items, ranks, batch size
sizes_seed = st.integers(0, 5)


@given(counts, st.booleans(), sizes_seed)
def test_in_evaluation_every_item_counts_once(numbers, grouped, seed):
    items, ranks, batch_size = numbers
    dataset = dataset_of(torch.randint(1, 20, (items,), generator=torch.Generator().manual_seed(seed)).tolist())
    shares = [list(s) for s in samplers(dataset, ranks, batch_size, shuffle=False, group_by_length=grouped)]
    assert {len(share) for share in shares} == {-(-items // ranks)}
    flat = [index for share in shares for index in share]
    assert sorted(index for index in flat if index >= 0) == list(range(items))
    assert sum(index < 0 for index in flat) < ranks


@given(counts)
def test_in_evaluation_items_may_be_repeated(numbers):
    items, ranks, batch_size = numbers
    dataset = dataset_of([1 + index % 7 for index in range(items)])
    flat = [index for share in samplers(dataset, ranks, batch_size, shuffle=False, repeats=True) for index in share]
    assert set(flat) == set(range(items))
    assert len(flat) - items < ranks


@given(counts, st.booleans(), st.booleans(), st.integers(0, 3))
def test_in_training_every_item_counts_once_an_epoch(numbers, grouped, repeats, epoch):
    items, ranks, batch_size = numbers
    dataset = dataset_of([1 + index % 7 for index in range(items)])
    everyone = samplers(dataset, ranks, batch_size, shuffle=True, group_by_length=grouped, seed=3, repeats=repeats)
    for sampler in everyone:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in everyone]
    assert {len(share) for share in shares} == {len(everyone[0])} == {-(-items // ranks)}
    flat = [index for share in shares for index in share]
    assert len(flat) - items < ranks
    assert set(range(items)) <= set(flat)
    if repeats:  # a row without labels is a NaN for a step that does not expect it
        assert min(flat) >= 0
    else:
        assert sum(index >= 0 for index in flat) == items
    assert shares == [list(sampler) for sampler in everyone]  # the same epoch has the same order


@given(counts, st.booleans(), st.integers(1, 5), st.integers(0, 8))
def test_an_epoch_continues_on_another_number_of_ranks(numbers, grouped, ranks_after, steps):
    items, ranks, batch_size = numbers
    dataset = dataset_of([1 + index % 7 for index in range(items)])
    before = samplers(dataset, ranks, batch_size, shuffle=True, group_by_length=grouped)
    loaders = [ResumableLoader(dataset, batch_size, sampler=s, collate_fn=Collator(0)) for s in before]
    for loader in loaders:
        loader.sampler.set_epoch(2)
    seen = set()
    for loader in loaders:
        for _, batch in zip(range(steps), loader, strict=False):
            seen |= set(batch["input_ids"].max(dim=1).values.tolist())
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    after = samplers(dataset, ranks_after, batch_size, shuffle=True, group_by_length=grouped)
    rest: list[int] = []
    for sampler in after:
        loader = ResumableLoader(dataset, batch_size, sampler=sampler, collate_fn=Collator(0))
        loader.load_state_dict(loaders[0].state_dict())
        sampler.set_epoch(2)  # as Lightning does, after it has loaded the state
        rest += [index for index in sampler if index >= 0]
    if len(seen) == items:  # the epoch was over: it would begin anew
        assert set(rest) == set(range(items))
    else:
        assert set(rest) | seen == set(range(items))
        assert len(rest) - (items - len(seen)) < ranks_after  # nothing but the filling is seen twice
    after[0].set_epoch(3)
    assert after[0].start == 0
    assert after[0].order_step_size == ranks_after * batch_size


def test_the_order_depends_on_seed_and_epoch():
    dataset = dataset_of([3] * 50)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        (sampler,) = samplers(dataset, 1, 4, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_grouping_makes_steps_of_similar_lengths_and_begins_with_the_longest():
    sizes = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset, ranks, batch_size = dataset_of(sizes), 4, 4

    def padded(grouped):
        shares = [list(s) for s in samplers(dataset, ranks, batch_size, shuffle=True, group_by_length=grouped)]
        starts = range(0, len(shares[0]), batch_size)
        steps = [list(chain.from_iterable(share[at : at + batch_size] for share in shares)) for at in starts]
        return sum(max(sizes[i] for i in step) * len(step) for step in steps), steps

    random, _ = padded(False)
    grouped, steps = padded(True)
    # the tokens themselves are 0.54 of what random batches are padded to; grouping must come near
    assert grouped < 0.62 * random
    assert max(sizes) in {sizes[i] for i in steps[0]}
    longest = [max(sizes[i] for i in step) for step in steps]
    assert longest != sorted(longest, reverse=True)  # steps are shuffled


@pytest.mark.parametrize("tokens_per_batch", [None, 64])
def test_an_epoch_does_not_continue_in_another_order(tokens_per_batch):
    """Some items would come twice, and others never. From the end of an epoch everything may change."""

    def sampler(sizes, **settings):
        if tokens_per_batch is None:
            return ShardedSampler(dataset_of(sizes), batch_size=2, num_replicas=2, rank=0, shuffle=True, **settings)
        grouped = {"group_by_length": False, "tokens_per_batch": tokens_per_batch}
        return TokenBatchSampler(dataset_of(sizes), num_replicas=2, rank=0, shuffle=True, **grouped, **settings)

    sizes = [5] * 20
    state = sampler(sizes).state()
    sampler(sizes).resume(start=8, **state)
    for other, changed in (
        (sampler(sizes, seed=1), r"seed=0 \(now 1\)"),
        (sampler([*sizes, 5]), r"items=20 \(now 21\)"),
    ):
        with pytest.raises(InputError, match=f"in the middle of an epoch.*{changed}.*resume with the same data"):
            other.resume(start=8, **state)
        other.resume(start=20, **state)
        assert other.start == 0
    if tokens_per_batch is not None:  # lengths decide what a batch is
        with pytest.raises(InputError, match="lengths=crc32"):
            sampler([4, *sizes[1:]]).resume(start=8, **state)
    else:
        sampler([4, *sizes[1:]]).resume(start=8, **state)
    del state["order"]  # of an older version
    sampler(sizes, seed=1).resume(start=8, **state)


def of_two_ranks() -> None:
    dataset = dataset_of([3] * 4)
    alone = ShardedSampler(dataset, batch_size=1, num_replicas=1, rank=0, alone=True, shuffle=True)
    with pytest.raises(InputError, match="no other ranks were known, and there are 2"):
        list(alone)


def test_ranks_that_know_of_no_others_do_not_all_train_on_everything() -> None:
    run_ranks(2, of_two_ranks)
