"""Where a backward begins and ends: whether autograd runs one, and tensors that need no unit for theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether this thread runs a backward: then a forward recomputes activations, and its own backward follows."""
    return torch._C._current_graph_task_id() != -1


def started(tensor: Tensor) -> Tensor:
    """`tensor`, floating-point, as the start of a graph: it requires gradients, and its backward computes nothing.

    It has the same values in the same memory, and is not a leaf, so that it may be changed in place.
    """
    return _Start.apply(tensor, tensor.new_empty(0).requires_grad_())


def is_start(tensor: Tensor) -> bool:
    """Whether the backward of `tensor` computes nothing: it is a leaf, or comes from `started`."""
    return tensor.grad_fn is None or tensor.grad_fn.name() == f"{_Start.__name__}Backward"


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None
