"""Rows of examples: none is lost, and none sees another."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from lowrank_dist.data.packing import Collator, TokenDataset, pack
from lowrank_dist.data.tokenizing import IGNORE_INDEX

CAPACITY = 32


lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40)


def examples_of(sizes):
    """Examples whose tokens are all different, so that none can be lost or doubled unseen; half of each is trained."""
    examples, token = [], 1
    for size in sizes:
        tokens = torch.arange(token, token + size)
        labels = torch.where(torch.arange(size) >= (size + 1) // 2, tokens, IGNORE_INDEX)
        examples.append(torch.stack([tokens, labels]).int())
        token += size
    return examples


@given(lengths)
def test_packing_puts_every_example_into_one_row(sizes):
    rows = pack(sizes, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[index] for index in row) <= CAPACITY for row in rows)
    # any two rows would not fit into one: so at most twice the rows that the tokens alone ask for, and one
    assert len(rows) <= 2 * -(-sum(sizes) // CAPACITY) + 1


def test_rows_are_all_but_full():
    """Best fit fills 97 % of rows with lengths such as those of chats: half of them below 150 tokens, long tails."""
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randn(2000, generator=generator) + 5).exp().clamp(4, 2048).int().tolist()
    assert sum(sizes) > 0.97 * 2048 * len(pack(sizes, 2048))


@given(lengths, st.integers(1, 4), st.booleans(), st.booleans())
def test_no_token_is_lost_doubled_or_seen_from_another_example(sizes, batch_size, packed, padding_free):
    examples = examples_of(sizes)
    owner = {int(token): index for index, example in enumerate(examples) for token in example[0]}
    dataset = TokenDataset(examples, CAPACITY if packed else None)
    seen: list[int] = []
    trained: list[int] = []
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        batch = Collator(pad_token_id=0, padding_free=padding_free)([dataset[row] for row in rows])
        assert batch["input_ids"].shape[1] % 8 == 0
        if padding_free:
            assert len(batch["input_ids"]) == 1
            assert int((batch["input_ids"] == 0).sum()) < 8
        assert all(value.dtype == torch.int64 and value.shape == batch["labels"].shape for value in batch.values())
        real = batch["input_ids"] != 0
        assert (batch["labels"][~real] == IGNORE_INDEX).all()
        seen += batch["input_ids"][real].tolist()
        trained += batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
        if not (packed or padding_free):
            assert (batch["attention_mask"].bool() == real).all()
            continue
        assert "attention_mask" not in batch
        groups = find_packed_sequence_indices(batch["position_ids"])  # what transformers makes its mask of
        for row in range(len(real)):
            length = int(real[row].sum())
            owners = [owner[token] for token in batch["input_ids"][row, :length].tolist()] + [-1] * int(
                (~real[row]).sum()
            )
            found = [0] * len(owners) if groups is None else groups[row].tolist()
            for left in range(len(owners) - 1):
                assert (owners[left] == owners[left + 1]) == (found[left] == found[left + 1])
            first = [at for at in range(len(owners)) if at == 0 or owners[at] != owners[at - 1]]
            assert (batch["labels"][row, first] == IGNORE_INDEX).all()
            assert (batch["position_ids"][row, first] == 0).all()
    assert sorted(seen) == sorted(owner)
    assert sorted(trained) == sorted(int(t) for e in examples for t in e[1] if t != IGNORE_INDEX)


def test_a_filler_is_its_item_without_labels():
    dataset = TokenDataset(examples_of([5, 7]))
    item, filler = dataset[1], dataset[~1]
    assert torch.equal(item["input_ids"], filler["input_ids"])
    assert (item["labels"] != IGNORE_INDEX).any()
    assert (filler["labels"] == IGNORE_INDEX).all()
    assert torch.equal(item["labels"], dataset[1]["labels"])
