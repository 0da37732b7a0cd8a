"""Examples to batches: items of one example or one packed row, stored one after the other and padded to one length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from lowrank_dist.data.preference import SIDES
from lowrank_dist.data.tokenizing import IGNORE_INDEX, WEIGHTS

PAD_TO_MULTIPLE_OF = 8

_STORED = ("tokens", "labels", "sizes")


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
    along
        Further values of every token by name: fp32, [total].
    targets
        Class of each example: int64, [number of examples]; None if they have none.
    """

    tokens: Tensor
    labels: Tensor
    sizes: list[int]
    largest: int
    along: dict[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None

    @classmethod
    def of(
        cls,
        examples: Sequence[Tensor],
        along: Sequence[Mapping[str, Tensor]] = (),
        targets: Sequence[int] = (),
    ) -> Tokens:
        """Those of examples.

        Parameters
        ----------
        examples
            Token ids and labels of each: int32, [2, length].
        along
            Further values of the tokens of each: fp32, [length]. Where one lacks what others have, it has zeros, or
            ones for weights.
        targets
            Class of each; -1 for none.
        """
        sizes = [example.shape[1] for example in examples]
        tokens, labels = torch.cat(list(examples), dim=1)
        labels[list(accumulate(sizes, initial=0))[:-1]] = IGNORE_INDEX
        joined: dict[str, Tensor] = {}
        for name in sorted({name for one in along for name in one}):
            other = 1.0 if name == WEIGHTS else 0.0
            parts = (one.get(name, torch.full((size,), other)) for one, size in zip(along, sizes, strict=True))
            joined[name] = torch.cat(list(parts))
        classes = torch.tensor(targets, dtype=torch.int64) if any(target >= 0 for target in targets) else None
        return cls(tokens=tokens, labels=labels, sizes=sizes, largest=int(tokens.max()), along=joined, targets=classes)

    @classmethod
    def mapped(cls, stored: Mapping[str, Tensor], *, largest: int) -> Tokens:
        """Those of tensors that stand in a file (`stored`); ValueError if they do not go together."""
        along = {name: values for name, values in stored.items() if name not in (*_STORED, "targets")}
        tokens, labels, sizes = (stored.get(name, torch.empty(0)) for name in _STORED)
        targets = stored.get("targets")
        if (tokens.dtype, labels.dtype) != (torch.int32, torch.int32) or tokens.shape != labels.shape:
            raise ValueError("tokens and labels are not int32 of one length")
        if sizes.dtype != torch.int64 or sizes.dim() != 1 or not len(sizes) or int(sizes.min()) < 1:
            raise ValueError("sizes are not positive numbers")
        if tokens.dim() != 1 or int(sizes.sum()) != len(tokens):
            raise ValueError(f"sizes do not add up to the {len(tokens)} tokens")
        if any(values.dtype != torch.float32 or values.shape != tokens.shape for values in along.values()):
            raise ValueError("values of the tokens are not fp32 of their number")
        if targets is not None and (targets.dtype != torch.int64 or targets.shape != sizes.shape):
            raise ValueError("there is not one class for each example")
        return cls(tokens=tokens, labels=labels, sizes=sizes.tolist(), largest=largest, along=along, targets=targets)

    def stored(self) -> dict[str, Tensor]:
        """All of it as tensors, for a file."""
        stored = {"tokens": self.tokens, "labels": self.labels, "sizes": self.sizes_tensor(), **self.along}
        return stored if self.targets is None else {**stored, "targets": self.targets}

    def sizes_tensor(self) -> Tensor:
        """The sizes: int64, [number of examples]."""
        return torch.tensor(self.sizes, dtype=torch.int64)


class Items(Dataset[dict[str, Any]]):
    """Items of a set, by their index.

    Attributes
    ----------
    lengths
        Number of tokens of each item; of a pair, those of the longer one.
    per_item
        Rows of an item in a batch.
    part_sizes
        Number of items of each part that the set is made of.
    unit
        What an item is, in the plural.

    Notes
    -----
    Item ``~i`` (negative) is item ``i`` with all labels set to -100: a filler, which takes part in a step but not in
    the loss.
    """

    lengths: list[int]
    per_item: int
    part_sizes: list[int]
    unit: str

    def __len__(self) -> int:
        return len(self.lengths)


class TokenDataset(Items):
    """Tokenized examples; an item is one example, one packed row, or one pair of a chosen and a rejected example.

    Parameters
    ----------
    examples
        `Tokens`, or token ids and labels of each example: int32, [2, length].
    capacity
        Largest number of tokens in a packed row. None: no packing.
    per_item
        Consecutive examples in an item: 1, or 2 for pairs. Not with packing.
    """

    def __init__(self, examples: Tokens | Sequence[Tensor], capacity: int | None = None, *, per_item: int = 1) -> None:
        self.examples = examples if isinstance(examples, Tokens) else Tokens.of(examples)
        sizes = self.examples.sizes
        self.packed, self.per_item = capacity is not None, per_item
        if capacity is not None:
            self.rows = pack(sizes, capacity)
        else:
            self.rows = [list(range(at, at + per_item)) for at in range(0, len(sizes), per_item)]
        self.starts = list(accumulate(sizes, initial=0))
        # the examples of a pair are rows of their own, padded to the longer one
        longest = sum if self.packed else max
        self.lengths = [longest([sizes[index] for index in row]) for row in self.rows]
        self.part_sizes = [len(self.rows)]
        self.unit = "packed rows" if self.packed else "examples" if per_item == 1 else "pairs"
        #: Further values of tokens that items have although these examples do not: zeros, or ones for weights.
        self.also: list[str] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return item `index`: `input_ids`, `labels` and, if packed, `position_ids`; each int64 of shape [length].

        Also `weights` (fp32) and `token_type_ids` (int64) of this shape, if an example has such. In place of labels an
        example with a class has that: int64 scalar. A pair is `chosen` and `rejected`, an item each.
        """
        row = self.rows[index if index >= 0 else ~index]
        if self.per_item == 2:
            return {name: self._item([example], filler=index < 0) for name, example in zip(SIDES, row, strict=True)}
        return self._item(row, filler=index < 0)

    def _item(self, row: Sequence[int], *, filler: bool) -> dict[str, Tensor]:
        parts = [slice(self.starts[example], self.starts[example + 1]) for example in row]

        def joined(values: Tensor) -> Tensor:
            return torch.cat([values[part] for part in parts])

        item = {"input_ids": joined(self.examples.tokens).long(), "labels": joined(self.examples.labels).long()}
        for name, values in self.examples.along.items():
            item[name] = joined(values) if name == WEIGHTS else joined(values).long()
        for name in self.also:
            item[name] = torch.ones(len(item["labels"])) if name == WEIGHTS else torch.zeros_like(item["labels"])
        if self.examples.targets is not None:
            item["labels"] = self.examples.targets[row[0]].clone()
        if filler:
            item["labels"].fill_(IGNORE_INDEX)
        if self.packed:
            item["position_ids"] = torch.cat([torch.arange(part.stop - part.start) for part in parts])
        return item


class JoinedItems(Items):
    """The items of several `TokenDataset`, one after the other, where they are: nothing is copied."""

    def __init__(self, parts: Iterable[TokenDataset]) -> None:
        self.parts = list(parts)
        self.per_item, self.unit = self.parts[0].per_item, self.parts[0].unit
        self.part_sizes = [len(part) for part in self.parts]
        self.lengths = [length for part in self.parts for length in part.lengths]
        self._starts = list(accumulate(self.part_sizes, initial=0))
        names = sorted({name for part in self.parts for name in part.examples.along})
        for part in self.parts:
            part.also = [name for name in names if name not in part.examples.along]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an item of the part that it belongs to (see `TokenDataset`)."""
        place = index if index >= 0 else ~index
        part = bisect_right(self._starts, place) - 1
        inner = place - self._starts[part]
        return self.parts[part][inner if index >= 0 else ~inner]


class ItemLists(Dataset[list[dict[str, Any]]]):
    """Items of a set by lists of their indices, for samplers that make batches themselves."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.lengths, self.per_item, self.part_sizes = items.lengths, items.per_item, items.part_sizes
        self.unit = items.unit

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: int | Sequence[int]) -> list[dict[str, Any]]:
        """Return the items; of one index, a list of one."""
        return [self.items[index] for index in ([indices] if isinstance(indices, int) else indices)]


@dataclass(frozen=True)
class Collator:
    """Right-pads the items of a batch to one length, a multiple of 8; of pairs, all chosen ones come first.

    Parameters
    ----------
    pad_token_id
        Token of the padding, which no label asks for.
    padding_free
        Join the items of a batch in one row, which is padded to a multiple of 8.

    Notes
    -----
    A batch of single examples has an `attention_mask`. A packed batch and one without padding have `position_ids`
    instead, starting again from 0 at every example and at the padding: transformers finds the borders there and keeps
    attention within them, but only if it is given no `attention_mask` and no key-value cache. All values are int64 of
    shape [batch, length], and ``weights`` fp32.

    `DataCollatorForSeq2Seq` of transformers pads no `position_ids`, and takes a tokenizer, which must have a padding
    token and pads on the side that it chooses; `DataCollatorWithFlattening` knows no packed rows and no weights.
    """

    pad_token_id: int
    padding_free: bool = False

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if SIDES[0] in items[0]:
            items = [item[side] for side in SIDES for item in items]
        if self.padding_free:
            items = [_joined(items)]
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        batch: dict[str, Tensor] = default_collate([self._padded(item, length) for item in items])
        return batch

    def _padded(self, item: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        tokens = item["input_ids"]
        missing = length - len(tokens)
        row = {
            "input_ids": F.pad(tokens, (0, missing), value=self.pad_token_id),
            "labels": F.pad(item["labels"], (0, missing), value=IGNORE_INDEX)
            if item["labels"].dim()
            else item["labels"],
        }
        row |= {name: F.pad(item[name], (0, missing)) for name in item if name in (WEIGHTS, "token_type_ids")}
        if "position_ids" in item:
            return row | {"position_ids": torch.cat([item["position_ids"], torch.arange(missing)])}
        return row | {"attention_mask": F.pad(torch.ones_like(tokens), (0, missing))}


def _joined(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The items as one packed row; none of them begins with a label."""
    joined = {name: torch.cat([item[name] for item in items]) for name in items[0]}
    positions = (item.get("position_ids", torch.arange(len(item["input_ids"]))) for item in items)
    return joined | {"position_ids": torch.cat(list(positions))}
