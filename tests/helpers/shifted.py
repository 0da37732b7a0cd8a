"""Shifted sparse attention as the paper has it, written out as a mask over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed(length: int, heads: int, group: int) -> Tensor:
    """Which token sees which, ``[heads, length, length]``: algorithm 1 with the ends of a row kept apart."""
    place = torch.arange(length)
    of_straight = place // group
    of_shifted = (place + group // 2) // group  # the first and the last group have half of the tokens
    groups = torch.stack([of_straight if head < heads // 2 else of_shifted for head in range(heads)])
    return (groups[:, :, None] == groups[:, None, :]) & (place[:, None] >= place[None, :])


def plain(query: Tensor, key: Tensor, value: Tensor, group: int) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed(query.shape[2], query.shape[1], group), float("-inf"))
    return scores.softmax(-1) @ value
