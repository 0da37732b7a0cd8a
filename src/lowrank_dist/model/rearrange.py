"""Conversions of transformers that take rows of stored tensors to other places: fused projections, chunked or joined.

Which row goes where is asked of transformers' own operations: they convert row numbers in place of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lowrank_dist.storage.reader import Piece

#: Operations of ``transformers.core_model_loading`` that move whole rows, if their dimension is the first.
_OF_ROWS = ("Chunk", "Split", "Concatenate", "Interleave", "PermuteForRope")


def rearranges_rows(converter: Any) -> bool:
    """Whether a ``WeightConverter`` only moves rows of the first dimension."""
    return all(
        type(operation).__name__ in _OF_ROWS and getattr(operation, "dim", 0) == 0 for operation in converter.operations
    )


def rearranged(
    name: str,
    sources: Mapping[str, Sequence[str]],
    converter: Any,
    shapes: Mapping[str, tuple[int, ...]],
    backbone: nn.Module,
) -> dict[str, list[Piece]]:
    """The parameters that `converter` makes, each as rows of stored tensors in their order.

    Parameters
    ----------
    name
        Name of the first of these parameters, as transformers' renaming gives it.
    sources
        Names of the stored tensors, by the pattern of the converter that they match.
    converter
        A ``WeightConverter`` for which `rearranges_rows` is true.
    shapes
        Shapes of the stored tensors.
    backbone
        The model, whose configuration says how many parts there are.
    """
    keys = [key for pattern in converter.source_patterns for key in sources.get(pattern, ())]
    first, numbers = 0, {}
    for key in keys:
        rows = shapes[key][0]
        numbers[key] = torch.arange(first, first + rows).unsqueeze(-1)
        first += rows
    values: Any = {pattern: [numbers[key] for key in found] for pattern, found in sources.items()}
    for operation in converter.operations:
        values = operation.convert(
            values,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=backbone,
            config=backbone.config,
            missing_keys=None,
        )
    full_name = name.replace("*.", "0.")
    prefix, _, suffix = next((full_name.partition(target) for target in values if target in full_name), ("", "", ""))
    starts = [int(numbers[key][0]) for key in keys]
    return {
        prefix + target + suffix: _pieces(rows[0] if isinstance(rows, list) else rows, keys, starts)
        for target, rows in values.items()
    }


def _pieces(rows: torch.Tensor, keys: Sequence[str], starts: Sequence[int]) -> list[Piece]:
    """Runs of consecutive rows of one stored tensor."""
    numbers = rows.flatten()
    owner = torch.bucketize(numbers, torch.tensor(starts), right=True) - 1
    breaks = (numbers.diff() != 1) | (owner.diff() != 0)
    bounds = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(numbers)]
    pieces = []
    for low, high in pairwise(bounds):
        key, start = keys[int(owner[low])], starts[int(owner[low])]
        pieces.append(Piece(key=key, start=int(numbers[low]) - start, stop=int(numbers[high - 1]) - start + 1))
    return pieces
