"""`FrozenLinear`: a linear layer over an encoded, row-sharded, frozen weight; one autograd Function.

The trade-off: the weight is decoded twice per step (forward and backward) and never kept. What the Function saves for
backward decides memory under ZeRO-3: it saves the stored *Parameter objects*. DeepSpeed frees their data after the
forward, gathers it again before the backward, and the saved Parameter then shows the gathered bytes; saving a view or
a decoded copy instead would keep every layer gathered until its backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.partition import RowPartition
from lowrank_dist.residual import ResidualFormat


class _FrozenLinearFunction(torch.autograd.Function):
    """``x W^T`` (or ``x W`` where rows are inputs) for a frozen encoded W; the gradient flows to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.layer = layer
        weight = layer.decode(stored, x.dtype)
        return x @ (weight if layer.input_first else weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        weight = ctx.layer.decode(stored, grad.dtype)
        return grad @ (weight.mT if ctx.layer.input_first else weight), None, *(None for _ in stored)


class FrozenLinear(nn.Module):
    """Linear layer whose weight is a frozen, encoded residual.

    Takes the place of the ``base_layer`` of a PEFT ``lora.Linear``. The parameters named by the residual format are
    registered by the walk, one flat tensor each.

    Parameters
    ----------
    partition
        Shape of the stored matrix and its sharding: ``[out, in]``, or ``[in, out]`` with `input_first`.
    residual
        How the matrix is encoded.
    compute_dtype
        Inputs are cast to it and outputs have it; autocast, where enabled, overrides it.
    input_first
        The stored matrix is ``[in, out]`` (GPT-2's Conv1D).
    """

    def __init__(
        self,
        partition: RowPartition,
        residual: ResidualFormat,
        *,
        compute_dtype: torch.dtype,
        input_first: bool = False,
    ) -> None:
        super().__init__()
        self.partition, self.residual, self.input_first = partition, residual, input_first
        self.compute_dtype = compute_dtype
        self.out_features, self.in_features = partition.rows, partition.columns
        if input_first:
            self.in_features, self.out_features = self.out_features, self.in_features
        self.stored_names = tuple(residual.storages(partition))
        for name in (*self.stored_names, "bias"):
            self.register_parameter(name, None)

    def stored(self) -> list[Tensor]:
        """The parameters that hold the encoded weight: the objects themselves, never views (see the module's notes)."""
        return [self._parameters[name] for name in self.stored_names]  # type: ignore[misc]

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The stored matrix in `dtype`, from its gathered storages."""
        by_name: Mapping[str, Tensor] = dict(zip(self.stored_names, stored, strict=True))
        return self.residual.decode(by_name, self.partition, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of any floating type to ``[..., out]`` in the compute dtype."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        x = x.to(torch.get_autocast_dtype(device) if autocast else self.compute_dtype)
        with torch.autocast(device, enabled=False):
            y = _FrozenLinearFunction.apply(x, self, *self.stored())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, residual={self.residual}"
