"""Gradients that a ZeRO-3 engine accumulates over the batches of a step.

DeepSpeed sums the averaged gradients of every batch in one flat tensor, this rank's shards of all trained parameters.
It has no function that scales them in the middle of a step, so this module accesses the tensor by a private name, which
``docs/private-names.md`` lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_gradients(zero: Any, factor: Tensor) -> None:
    """Multiply the gradients accumulated so far in this step by `factor`, in place. No communication.

    Gradients of later batches are added to the product. Norms, and with them clipping, are computed at the end of the
    step and see it. The host waits for the device only if the optimizer, and with it the gradients, are offloaded.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3.
    factor
        Scalar, equal on all ranks.
    """
    gradients = zero.grad_partitions_flat_buffer
    gradients.mul_(factor.to(gradients.device))


def copied_gradients(zero: Any) -> Tensor:
    """Return a copy of the gradients of this step in fp32, flat, where they are. No communication.

    It has this rank's shards of all trained parameters, padding included, in the order of
    `lowrank_dist.zero3.optimizer.ShardedOptimizer.masters`.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3.
    """
    gradients: Tensor = zero.grad_partitions_flat_buffer
    return gradients.to(torch.float32, copy=True)


def clear_gradients(zero: Any) -> None:
    """Set the gradients of the last step to zero. No communication.

    DeepSpeed overwrites a gradient with the first one of the next step. That of a parameter without a gradient in the
    next step would be left, and would be scaled again in every step.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3.
    """
    zero.grad_partitions_flat_buffer.zero_()
