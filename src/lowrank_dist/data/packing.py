"""Examples to batches: items of one example or one packed row, stored one after the other and padded to one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenized examples, one after the other.

    Attributes
    ----------
    tokens, labels
        Token ids and labels: int32, [total]. Nothing predicts the first token of an example, which has no label.
    sizes
        Number of tokens in each example.
    largest
        Largest token id.
    """

    tokens: Tensor
    labels: Tensor
    sizes: list[int]
    largest: int

    @classmethod
    def of(cls, examples: Sequence[Tensor]) -> Tokens:
        """Those of examples: token ids and labels of each, int32, [2, length]."""
        sizes = [example.shape[1] for example in examples]
        tokens, labels = torch.cat(list(examples), dim=1)
        labels[list(accumulate(sizes, initial=0))[:-1]] = IGNORE_INDEX
        return cls(tokens=tokens, labels=labels, sizes=sizes, largest=int(tokens.max()))

    @classmethod
    def mapped(cls, tokens: Tensor, labels: Tensor, sizes: Tensor, *, largest: int) -> Tokens:
        """Those of tensors that stand in a file; ValueError if they do not go together."""
        if (tokens.dtype, labels.dtype) != (torch.int32, torch.int32) or tokens.shape != labels.shape:
            raise ValueError("tokens and labels are not int32 of one length")
        if sizes.dtype != torch.int64 or sizes.dim() != 1 or not len(sizes) or int(sizes.min()) < 1:
            raise ValueError("sizes are not positive numbers")
        if tokens.dim() != 1 or int(sizes.sum()) != len(tokens):
            raise ValueError(f"sizes do not add up to the {len(tokens)} tokens")
        return cls(tokens=tokens, labels=labels, sizes=sizes.tolist(), largest=largest)

    def sizes_tensor(self) -> Tensor:
        """The sizes: int64, [number of examples]."""
        return torch.tensor(self.sizes, dtype=torch.int64)


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenized examples; an item is one example or one packed row.

    Parameters
    ----------
    examples
        `Tokens`, or token ids and labels of each example: int32, [2, length].
    capacity
        Largest number of tokens in a packed row. None: no packing, one example per item.

    Notes
    -----
    Item ``~i`` (negative) is item ``i`` with all labels set to -100: a filler, which takes part in a step but not in
    the loss.
    """

    def __init__(self, examples: Tokens | Sequence[Tensor], capacity: int | None = None) -> None:
        self.examples = examples if isinstance(examples, Tokens) else Tokens.of(examples)
        sizes = self.examples.sizes
        self.rows = [[index] for index in range(len(sizes))] if capacity is None else pack(sizes, capacity)
        self.packed = capacity is not None
        self.starts = list(accumulate(sizes, initial=0))
        self.lengths = [sum(sizes[index] for index in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item `index`: `input_ids`, `labels` and, if packed, `position_ids`; each int64 of shape [length]."""
        row = self.rows[index if index >= 0 else ~index]
        parts = [slice(self.starts[example], self.starts[example + 1]) for example in row]
        tokens, labels = (
            torch.cat([values[part] for part in parts]).long()
            for values in (self.examples.tokens, self.examples.labels)
        )
        item = {"input_ids": tokens, "labels": labels}
        if index < 0:
            item["labels"].fill_(IGNORE_INDEX)
        if self.packed:
            item["position_ids"] = torch.cat([torch.arange(part.stop - part.start) for part in parts])
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
