"""Adapted parameters, mostly stacks of experts' weights: PEFT's ``ParamWrapper`` over an encoded residual.

A mixture of experts keeps ``[experts, rows, columns]`` parameters and uses them whole in its forward. During that
forward they are ordinary dense tensors ``W_e + scaling * B_e A_e``, in the compute dtype, with a gradient to A and B.
Under gradient checkpointing only the experts of one layer are dense at a time, in the forward and again in the
backward, where their gradient takes as much memory again. Without it the experts of every layer stay dense until its
backward.

The layout of the factors is PEFT's, see `lowrank_dist.model.stacking`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.frozen import FrozenWeight
from lowrank_dist.model.stacking import split_a, split_b
from lowrank_dist.quantization.format import ResidualFormat


class AdaptedParameter(FrozenWeight):
    """Replaces a PEFT ``lora.ParamWrapper`` and keeps the names of its children.

    Parameters
    ----------
    partition
        Shape and sharding of one matrix of the stack.
    residual
        How it is encoded. Storages hold, rank by rank, the concatenated shards of all matrices.
    compute_dtype
        Dtype of the dense parameter.
    wrapper
        The layer that it replaces; provides the factors and the wrapped module.
    adapter
        Name of the adapter.
    parameter
        Name of the adapted parameter, which is deleted from its module.
    experts
        Number of matrices in the stack; None if the parameter is a single matrix.
    input_first
        Whether matrices are ``[in, out]``.
    """

    def __init__(
        self,
        partition: RowPartition,
        residual: ResidualFormat,
        *,
        compute_dtype: torch.dtype,
        wrapper: Any,
        adapter: str,
        parameter: str,
        experts: int | None,
        input_first: bool,
    ) -> None:
        super().__init__(partition, residual, compute_dtype=compute_dtype)
        self.base_layer = wrapper.base_layer
        self.lora_A, self.lora_B = wrapper.lora_A, wrapper.lora_B
        self.scaling = float(wrapper.scaling[adapter])
        self.adapter, self.parameter, self.experts, self.input_first = adapter, parameter, experts, input_first
        delattr(self._owner(), parameter)

    def _owner(self) -> nn.Module:
        """The module that had the parameter, below any nested wrappers of its other parameters."""
        module = self.base_layer
        while isinstance(module, AdaptedParameter) or hasattr(module, "parameter_name"):
            module = module.base_layer
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module with the adapted parameter."""
        owner = self._owner()
        setattr(owner, self.parameter, self.dense())
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            delattr(owner, self.parameter)

    def dense(self) -> Tensor:
        """Compute the adapted parameter, ``[experts, rows, columns]`` or ``[rows, columns]``, in the compute dtype."""
        a, b = self.lora_A[self.adapter].weight, self.lora_B[self.adapter].weight
        with torch.no_grad():
            weight = self.decode_stack()
        a, b = split_a(a, len(weight)), split_b(b, len(weight))
        left, right = (a.mT, b.mT) if self.input_first else (b, a)
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.baddbmm_(left.to(weight.dtype), right.to(weight.dtype), alpha=self.scaling)
        return weight if self.experts is not None else weight[0]

    def decode_stack(self) -> Tensor:
        """Decode the gathered storages: residuals ``[experts or 1, rows, columns]`` in the compute dtype."""
        count, partition = self.experts or 1, self.partition
        shards = {
            name: storage.view(partition.world_size, count, -1) for name, storage in self.by_name(self.stored()).items()
        }
        device = self.stored()[0].device
        out = torch.empty(count, partition.rows, partition.columns, dtype=self.compute_dtype, device=device)
        for index in range(count):
            of_one = {name: shard[:, index].flatten() for name, shard in shards.items()}
            out[index] = self.residual.decode(of_one, partition, self.compute_dtype)
        return out
