"""Gradients that a ZeRO-3 engine accumulates over the batches of a step.

DeepSpeed sums the averaged gradients of every batch in one flat tensor, this rank's shards of all trained parameters.
It has no function that scales them in the middle of a step, so this module accesses the tensor by a private name, which
``docs/private-names.md`` lists.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.zero3.partition import local_shard, shaped, whole_shape


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


class WholeGradients:
    """The gradients of a step as ``parameter.grad``, whole on every rank, for code that reads or changes them there.

    Norms, clipping and logging of users and of Lightning then see what they see under DDP. The engine itself keeps no
    ``parameter.grad``, so that they must be taken back before its next backward and before it steps.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3.
    group
        The ranks over which trained parameters are partitioned.

    Attributes
    ----------
    shown : bool
        Whether they are there now.
    """

    def __init__(self, zero: Any, group: ShardGroup) -> None:
        self._zero, self._group = zero, group
        self._before: Tensor | None = None

    @property
    def shown(self) -> bool:
        return self._before is not None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the optimizer, in the order of their gradients."""
        return list(chain.from_iterable(self._zero.fp16_groups))

    @torch.no_grad()
    def show(self) -> None:
        """Give every trained parameter its gradient, averaged over the ranks and summed over the batches so far.

        One all-gather. Gradients have the shape and dtype of the whole parameter. They are zero where there is none.
        """
        parameters = self.parameters
        device = parameters[0].device
        mine = self._zero.grad_partitions_flat_buffer.to(device)
        every, start = self._group.gather_equal(mine).view(self._group.size, -1), 0
        for parameter in parameters:
            numel, shape = local_shard(parameter).numel(), whole_shape(parameter)
            whole = every[:, start : start + numel].flatten()[: shape.numel()]
            with shaped([parameter]):  # a gradient has the shape of its parameter when it is set
                parameter.grad = whole.view(shape).to(parameter.dtype, copy=True)
            start += numel
        self._before = self._own(parameters)

    @torch.no_grad()
    def take_back(self) -> None:
        """Set what was changed in the engine, and leave no ``parameter.grad``. No communication.

        Changes must be the same on all ranks. An entry that was not changed keeps its value in the engine, which may
        be more accurate.

        Raises
        ------
        InputError
            If something was changed but the optimizer is offloaded: the engine has copied the gradients already.
        """
        if self._before is None:
            return
        parameters, before = self.parameters, self._before
        self._before, after = None, self._own(parameters)
        for parameter in parameters:
            parameter.grad = None
        engine = self._zero.grad_partitions_flat_buffer
        changed = after != before
        if self._zero.offload_optimizer:
            if changed.any():
                raise InputError(
                    "gradients were changed before the step (clipped, scaled or set to zero), but with "
                    "offload_optimizer=True DeepSpeed has copied them to the host already; leave offload_optimizer "
                    "out, or clip by Trainer(gradient_clip_val=...) under automatic optimization"
                )
            return
        engine.copy_(torch.where(changed, after.to(engine), engine))

    def drop(self) -> None:
        """Set the gradients to zero if they are shown, in the engine too, as ``zero_grad`` does. No communication."""
        if self._before is not None:
            self._before = None
            for parameter in self.parameters:
                parameter.grad = None
            clear_gradients(self._zero)

    def _own(self, parameters: list[Tensor]) -> Tensor:
        """This rank's part of the gradients that are shown, flat, with padding of zeros."""
        rank, parts = self._group.rank, []
        for parameter in parameters:
            numel = local_shard(parameter).numel()
            part = parameter.new_zeros(numel)
            if parameter.grad is not None:
                held = parameter.grad.flatten()[rank * numel : (rank + 1) * numel]
                part[: held.numel()] = held
            parts.append(part)
        return torch.cat([part.float() for part in parts])
