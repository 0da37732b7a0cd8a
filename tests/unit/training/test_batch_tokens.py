"""Which tokens of a batch are real, and which are trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lowrank_dist.data.packing import Collator, TokenDataset
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError
from lowrank_dist.training.batch_tokens import BatchTokens

IDS = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
# the first label of a row is predicted by nothing
LABELS = torch.tensor([[5, 6, 7, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])


def counts(batch: object) -> tuple[int, int, int]:
    found = BatchTokens.of(batch)
    return found.positions, int(found.real()), int(found.trained())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, (8, 5, 2)),
        (BatchEncoding({"input_ids": IDS, "attention_mask": MASK.bool()}), (8, 5, 5)),
        ({"input_ids": IDS, "labels": LABELS}, (8, 8, 2)),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1])}, (8, 8, 8)),
        (IDS, (8, 8, 8)),
        ([IDS], (8, 8, 8)),
        ((IDS, torch.tensor([0, 1])), (8, 8, 8)),
    ],
    ids=["padded", "without labels", "without mask", "labels of rows", "tensor", "list", "tuple"],
)
def test_real_and_trained_tokens(batch: object, expected: tuple[int, int, int]) -> None:
    assert counts(batch) == expected


@pytest.mark.parametrize("batch", [{"text": IDS}, {"input_ids": IDS[0]}, "text", [], None], ids=repr)
def test_other_batches_are_refused(batch: object) -> None:
    with pytest.raises(InputError, match=r"`input_ids` of shape \[batch, length\]"):
        BatchTokens.of(batch)


def example(prompt: int, answer: int) -> Tensor:
    ids = torch.arange(1, prompt + answer + 1)
    return torch.stack([ids, ids.where(ids > prompt, IGNORE_INDEX)]).int()


@pytest.mark.parametrize("capacity", [None, 16])
def test_the_padding_of_the_data_module_is_found(capacity: int | None) -> None:
    """Single examples have a mask, packed rows positions. One row of 16 is full, another ends in an example of 1."""
    sizes = [(9, 7), (8, 2), (0, 1), (3, 1), (2, 1)]
    dataset = TokenDataset([example(*size) for size in sizes], capacity)
    batch = Collator(0)([dataset[index] for index in range(len(dataset))])
    assert ("attention_mask" in batch) == (capacity is None)
    assert counts(batch)[1] == sum(map(sum, sizes))
    assert batch["input_ids"].numel() > sum(map(sum, sizes))
