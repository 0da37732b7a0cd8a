"""Batches of so many tokens: none is larger, every item counts once, and runs resume, also on other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.sft import save_material
from lowrank_dist import InputError, SFTDataModule
from lowrank_dist.data.packing import Collator, ItemLists, TokenDataset
from lowrank_dist.data.sampler import ResumableLoader
from lowrank_dist.data.token_batches import TokenBatchSampler

MOST = 64
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)
ranks_ = st.integers(1, 5)


def samplers(sizes: list[int], ranks: int, *, per_item: int = 1, **settings) -> list[TokenBatchSampler]:
    examples = [torch.full((2, size), index, dtype=torch.int32) for index, size in enumerate(sizes)]
    dataset = TokenDataset(examples, per_item=per_item)
    options = {"group_by_length": False, "shuffle": True, "seed": 3, **settings}
    return [
        TokenBatchSampler(dataset, tokens_per_batch=MOST * per_item, num_replicas=ranks, rank=rank, **options)
        for rank in range(ranks)
    ]


def tokens_of(batch: list[int], dataset: TokenDataset, *, padding_free: bool) -> int:
    return Collator(0, padding_free=padding_free)(ItemLists(dataset)[batch])["input_ids"].numel()


@given(lengths, ranks_, st.booleans(), st.booleans(), st.integers(0, 2), st.sampled_from(["", "pairs", "joined"]))
def test_every_item_counts_once_and_no_batch_is_too_large(sizes, ranks, grouped, shuffle, epoch, kind):
    pairs, joined = kind == "pairs", kind == "joined"
    sizes = sizes + sizes if pairs else sizes
    options = {"group_by_length": grouped, "shuffle": shuffle, "padding_free": joined}
    everyone = samplers(sizes, ranks, per_item=1 + pairs, **options)
    for sampler in everyone:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in everyone]
    assert {len(share) for share in shares} == {len(everyone[0])}
    flat = [index for share in shares for batch in share for index in batch]
    assert sorted(index for index in flat if index >= 0) == list(range(len(sizes) // (1 + pairs)))
    dataset = everyone[0].dataset
    found = [tokens_of(batch, dataset, padding_free=joined) for share in shares for batch in share]
    assert max(found) <= MOST * (1 + pairs)
    # only the last step may lack batches
    assert all(min(batch) >= 0 for share in shares for batch in share[:-1])
    assert shares == [list(sampler) for sampler in everyone]


@given(lengths, ranks_, ranks_, st.booleans(), st.integers(0, 5))
def test_an_epoch_goes_on_on_other_ranks(sizes, before, after, grouped, steps):
    first = samplers(sizes, before, group_by_length=grouped)
    steps = min(steps, len(first[0]))
    loaders = [ResumableLoader(ItemLists(s.dataset), None, sampler=s, collate_fn=Collator(0)) for s in first]
    seen: list[int] = []
    for loader in loaders:
        iterator = iter(loader)
        for _ in range(steps):
            seen += next(iterator)["input_ids"][:, 0].tolist()
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    second = samplers(sizes, after, group_by_length=grouped)
    for sampler in second:
        sampler.resume(**states[0])
    if 0 < steps == len(first[0]):
        return  # a new epoch begins
    left = [index for sampler in second for batch in sampler for index in batch if index >= 0]
    done = set(range(len(sizes))) - set(left)
    assert len(left) == len(set(left))
    assert done <= set(seen)
    if before == after and steps < len(first[0]):
        rest = [list(sampler)[steps:] for sampler in samplers(sizes, before, group_by_length=grouped)]
        assert [list(sampler) for sampler in second] == rest


def test_epochs_have_the_same_batches_in_another_order():
    (sampler,) = samplers([7, 50, 3, 9, 30, 12, 8, 8, 41, 2] * 3, 1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({str(order) for order in orders}) == 3
    assert len({str(sorted(order)) for order in orders}) == 1


def test_similar_lengths_make_fewer_batches():
    sizes = [5, 50] * 40
    (mixed,), (grouped,) = (samplers(sizes, 1, group_by_length=way) for way in (False, True))
    assert len(grouped) < len(mixed)


def test_a_resumed_run_must_have_the_same_batches():
    (sampler,) = samplers([5] * 10, 1)
    with pytest.raises(InputError, match=r"had tokens_per_batch=32, and this one has 64"):
        sampler.resume(epoch=0, start=4, tokens_per_batch=32)
    with pytest.raises(InputError, match=r"had tokens_per_batch=None"):
        sampler.resume(epoch=0, start=4, order_step_size=8)
    with pytest.raises(InputError, match=r"had padding_free=True, and this one has False"):
        sampler.resume(start=4, **samplers([5] * 10, 1, padding_free=True)[0].state())


def test_the_data_module(tmp_path: Path):
    records = [{"prompt": "hello ", "completion": "four " * (1 + place % 9)} for place in range(40)]
    material = save_material(tmp_path, records)
    model, file = str(material / "model"), str(material / "data.jsonl")
    for options in ({}, {"group_by_length": True}, {"packing": True}, {"padding_free": True}):
        data = SFTDataModule(model, file, validation=file, max_length=40, tokens_per_batch=120, **options)
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            batches = list(loader)
            assert len(loader) == len(batches)
            assert max(batch["input_ids"].numel() for batch in batches) <= 120
            if data.padding_free:
                starts = sum(int((batch["position_ids"] == 0).sum()) for batch in batches)
                assert 40 <= starts <= 40 + len(batches)  # padding begins at 0 too
                continue
            assert sum(len(batch["input_ids"]) for batch in batches) == (
                40 if not data.packing else len(loader.dataset)
            )
    with pytest.raises(InputError, match="batch_size=2 and tokens_per_batch=120 exclude each other"):
        SFTDataModule(model, file, batch_size=2, tokens_per_batch=120)
    with pytest.raises(InputError, match="tokens_per_batch=32 must be at least 40"):
        SFTDataModule(model, file, max_length=40, tokens_per_batch=32)
