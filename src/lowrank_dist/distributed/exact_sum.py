"""A sum over all ranks that depends neither on the order of the numbers nor on the number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup

_BIN = 8  # exponents of two that share an integer
_LOWEST = -148  # exponent that frexp gives the smallest fp32 number, 2^-149
_BINS = (128 - _LOWEST) // _BIN + 1
_MANTISSA = 24
_LANES = 1024  # copies of the bins on CUDA


def exact_sum(values: Tensor, group: ShardGroup) -> float:
    """Sum the fp32 `values` of all ranks and round once, to fp64.

    Mantissas are added as integers, those of eight neighbouring exponents in one int64 (24 + 7 bits each). This is
    exact for up to 2^32 numbers of any range. A sum in floating point would depend on the order, hence on the number of
    ranks.

    Parameters
    ----------
    values
        Finite fp32 of any shape, this rank's part; may be empty.
    group
        The ranks that hold the parts. One all-reduce of 35 int64.

    Returns
    -------
    float
        The sum, replicated.
    """
    mantissa, exponent = torch.frexp(values.flatten())
    above = exponent.long() - _LOWEST
    integers = (mantissa * 2**_MANTISSA).long() << above % _BIN
    lanes, where = 1, above // _BIN
    if values.is_cuda:
        # Every lane has its own bins: neighbouring numbers mostly fall into one bin, and their atomic additions to it
        # would wait for each other.
        lanes = _LANES
        where = where * lanes + torch.arange(len(where), device=where.device) % lanes
    bins = torch.zeros(_BINS * lanes, dtype=torch.int64, device=values.device).scatter_add_(0, where, integers)
    bins = bins.view(_BINS, lanes).sum(1)
    total = sum(limb << _BIN * index for index, limb in enumerate(group.sum(bins).tolist()))
    return float(total / 2 ** (_MANTISSA - _LOWEST))  # a division of integers rounds once
