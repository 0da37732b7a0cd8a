"""Examples to batches: items of one example or one packed row, stored in flat tensors and padded to one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from lowrank_dist.data.tokenizing import IGNORE_INDEX

PAD_TO_MULTIPLE_OF = 8


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows of at most `capacity` tokens by best fit, longest examples first.

    Parameters
    ----------
    lengths
        Number of tokens in each example, at most `capacity`.
    capacity
        Largest number of tokens in a row.

    Returns
    -------
    list of list of int
        Indices of the examples in each row. Every example is in exactly one row.

    Notes
    -----
    O(n log n) in the number of examples. The number of rows is at most 11/9 of the optimum, plus one.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # number of free tokens -> rows with that many
    free: list[int] = []  # the keys, sorted
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[example]
        if (slot := bisect_left(free, length)) < len(free):
            left = free[slot]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], free[slot]
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        if left > length:
            if left - length not in open_rows:
                insort(free, left - length)
            open_rows.setdefault(left - length, []).append(row)
    return rows


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenized examples in two flat tensors; an item is one example or one packed row.

    Parameters
    ----------
    examples
        Token ids and labels of each example: int32, [2, length].
    capacity
        Largest number of tokens in a packed row. None: no packing, one example per item.

    Notes
    -----
    Item ``~i`` (negative) is item ``i`` with all labels set to -100: a filler, which takes part in a step but not in
    the loss.
    """

    def __init__(self, examples: Sequence[Tensor], capacity: int | None = None) -> None:
        sizes = [example.shape[1] for example in examples]
        self.rows = [[index] for index in range(len(sizes))] if capacity is None else pack(sizes, capacity)
        self.packed = capacity is not None
        order = list(chain.from_iterable(self.rows))
        self.tokens, self.labels = torch.cat([examples[index] for index in order], dim=1)  # [total] each
        self.sizes = [[sizes[index] for index in row] for row in self.rows]
        # nothing predicts the first token of an example; in a packed row the last one of another example would
        self.labels[list(accumulate(chain.from_iterable(self.sizes), initial=0))[:-1]] = IGNORE_INDEX
        self.lengths = [sum(row) for row in self.sizes]
        self.offsets = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item `index`: `input_ids`, `labels` and, if packed, `position_ids`; each int64 of shape [length]."""
        row = index if index >= 0 else ~index
        part = slice(self.offsets[row], self.offsets[row + 1])
        item = {"input_ids": self.tokens[part].long(), "labels": self.labels[part].long()}
        if index < 0:
            item["labels"].fill_(IGNORE_INDEX)
        if self.packed:
            item["position_ids"] = torch.cat([torch.arange(size) for size in self.sizes[row]])
        return item


@dataclass(frozen=True)
class Collator:
    """Right-pads the items of a batch to one length, a multiple of 8.

    Parameters
    ----------
    pad_token_id
        Token of the padding, which no label asks for.

    Notes
    -----
    A batch of single examples has an `attention_mask`. A packed batch has `position_ids` instead, starting again from 0
    at every example and at the padding: transformers finds the borders there and keeps attention within them, but only
    if it is given no `attention_mask` and no key-value cache. All values are int64 of shape [batch, length].

    `DataCollatorForSeq2Seq` of transformers pads no `position_ids`, and takes a tokenizer, which must have a padding
    token and pads on the side that it chooses; `DataCollatorWithFlattening` makes one row of a batch.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        batch: dict[str, Tensor] = default_collate([self._padded(item, length) for item in items])
        return batch

    def _padded(self, item: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        tokens = item["input_ids"]
        missing = length - len(tokens)
        row = {
            "input_ids": F.pad(tokens, (0, missing), value=self.pad_token_id),
            "labels": F.pad(item["labels"], (0, missing), value=IGNORE_INDEX),
        }
        if "position_ids" in item:
            return row | {"position_ids": torch.cat([item["position_ids"], torch.arange(missing)])}
        return row | {"attention_mask": F.pad(torch.ones_like(tokens), (0, missing))}
