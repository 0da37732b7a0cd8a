"""Adapted parameters, mostly stacks of experts' weights: PEFT's ``ParamWrapper`` over an encoded residual.

A mixture of experts keeps ``[experts, rows, columns]`` parameters. Here they are never dense as a whole: during the
forward of the module that owns them, a `StackedWeight` stands in their place. Its products
``y_i = x_i (W_e + scaling * B_e A_e)^T``, for rows i of expert e, are one autograd Function, which decodes at most
`experts_at_a_time` experts at a time, and only those that have rows. It saves its inputs and the parameters themselves,
and decodes again in backward. The factors are multiplied apart, ``2 r (in + out)`` flops a row, and never rounded into
the decoded weight.

Decoding communicates nothing: ZeRO-3 gathers the encoded bytes of all experts with their decoder layer. So ranks run
the same collectives whichever experts their tokens choose. Gradients of experts without tokens are zeros.

The layout of the factors is PEFT's, see `lowrank_dist.model.stacking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.frozen import FrozenWeight
from lowrank_dist.layers.grouped import Group, Rows, has_grouped_mm
from lowrank_dist.layers.stacked_weight import StackedWeight
from lowrank_dist.model.stacking import split_a, split_b
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.quantization.stacks import decode_stack, experts_at_a_time


class _StackProduct(torch.autograd.Function):
    """Rows ``[n, in]`` times the adapted matrices of their experts, ``[n, out]``.

    `a` and `b` are the factors of all experts, or those of the one expert that has rows; they are used for their
    gradients only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: AdaptedParameter, rows: Rows, expert: int | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = layer, rows, expert, layer.adapts
        y = x.new_empty(len(x), layer.out_features)
        if x.is_meta:  # nothing but shapes is wanted
            return y
        for group in layer.groups(x, rows):
            mine = x[group.rows]
            product = group.times(mine, layer.decoded(group, x.dtype))
            if layer.adapts:
                a_of, b_of = layer.factors(group, x.dtype)
                through_a = group.times(mine, a_of.mT)
                torch.add(product, group.times(through_a, b_of.mT), alpha=layer.scaling, out=y[group.rows])
            else:
                y[group.rows] = product
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, rows, expert, adapts = ctx.how
        wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        to_x = torch.empty_like(x) if wants_x else None
        to_a, to_b = layer.no_gradients(expert, adapts and wants_a, adapts and wants_b)
        for group in layer.groups(x, rows):
            mine, of_mine = x[group.rows], grad[group.rows]
            if adapts:
                a_of, b_of = layer.factors(group, x.dtype)
                through_b = group.times(of_mine, b_of).mul_(layer.scaling)
            if to_x is not None:
                product = group.times(of_mine, layer.decoded(group, x.dtype).mT)
                if adapts:
                    product.add_(group.times(through_b, a_of))
                to_x[group.rows] = product
            if to_a is not None:
                _put(to_a, group, expert, group.outer(through_b, mine))
            if to_b is not None:
                through_a = group.times(mine, a_of.mT).mul_(layer.scaling)
                _put(to_b, group, expert, group.outer(of_mine, through_a))
        if expert is not None:
            return to_x, None if to_a is None else to_a[0], None if to_b is None else to_b[0], None, None, None
        return (
            to_x,
            None if to_a is None else to_a.flatten(0, 1),
            None if to_b is None else to_b.permute(1, 2, 0).flatten(1),
            None,
            None,
            None,
        )


def _put(gradients: Tensor, group: Group, expert: int | None, of_group: Tensor) -> None:
    """Copy the gradients of the experts of a group to their places."""
    if expert is not None:
        gradients.copy_(of_group)
    else:
        gradients[group.of_all(gradients.device)] = of_group.to(gradients.dtype)


class AdaptedParameter(FrozenWeight):
    """Replaces a PEFT ``lora.ParamWrapper`` and keeps the names of its children.

    Parameters
    ----------
    partition
        Shape and sharding of one matrix of the stack.
    residual
        How it is encoded. Storages hold, rank by rank, the concatenated shards of all matrices.
    compute_dtype
        Inputs are cast to this dtype and outputs have it. Autocast overrides it where enabled.
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
    name
        Name of the adapted parameter in the model, for messages.

    Attributes
    ----------
    experts_at_a_time : int
        Most experts that are decoded at one time.
    adapts : bool
        Whether the adapter is added (`enable_adapters`).
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
        name: str = "",
    ) -> None:
        super().__init__(partition, residual, compute_dtype=compute_dtype)
        self.base_layer = wrapper.base_layer
        self.lora_A, self.lora_B = wrapper.lora_A, wrapper.lora_B
        self.scaling = float(wrapper.scaling[adapter])
        self.adapter, self.parameter, self.input_first = adapter, parameter, input_first
        self.name = name or parameter
        self.is_stack, self.experts = experts is not None, experts or 1
        self.in_features, self.out_features = partition.columns, partition.rows
        if input_first:
            self.in_features, self.out_features = self.out_features, self.in_features
        self.experts_at_a_time, self.adapts = self.experts, True
        delattr(self.owner(), parameter)

    def owner(self) -> nn.Module:
        """The module that had the parameter, below any nested wrappers of its other parameters."""
        module = self.base_layer
        while isinstance(module, AdaptedParameter) or hasattr(module, "parameter_name"):
            module = module.base_layer
        return module

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module with a stand-in for the adapted parameter."""
        owner = self.owner()
        shape = (self.experts, self.partition.rows, self.partition.columns)
        device = next(p for p in self.stored()).device
        weight = StackedWeight(_Forward(self), shape, device)
        setattr(owner, self.parameter, weight if self.is_stack else weight[0])
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            delattr(owner, self.parameter)

    def enable_adapters(self, enabled: bool) -> None:
        """Compute with the residual and the adapter, or with the residual alone."""
        self.adapts = enabled

    def groups(self, x: Tensor, rows: Rows) -> Any:
        """The groups of experts that are decoded together for inputs like `x`."""
        rank = self.lora_A[self.adapter].weight.shape[0] // self.experts
        sizes = (self.in_features, self.out_features, rank)
        if rows.ends is not None and self.experts_at_a_time >= self.experts and has_grouped_mm(x, *sizes):
            return [rows.as_one(self.experts)]  # the host need not know the rows
        return rows.groups(self.experts_at_a_time)

    def decoded(self, group: Group, dtype: torch.dtype) -> Tensor:
        """Decode the residuals of some experts: ``[experts, in, out]`` in `dtype`."""
        weights = self.decode_experts(group, dtype)
        return weights if self.input_first else weights.mT

    def decode_experts(self, group: Group, dtype: torch.dtype) -> Tensor:
        """Decode the residuals of some experts as stored: ``[experts, rows, columns]`` in `dtype`."""
        ranks, stored = self.partition.world_size, {}
        for name, storage in self.by_name(self.stored()).items():
            some = storage.detach().view(ranks, self.experts, -1)[:, group.of_all(storage.device)]
            # of one expert: its shards, rank by rank
            stored[name] = some[0] if ranks == 1 else some.transpose(0, 1).flatten(1)
        with torch.no_grad():
            return decode_stack(self.residual, stored, self.partition, dtype)

    def factors(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of some experts, A ``[experts, r, in]`` and B ``[experts, out, r]``, in `dtype`."""
        a, b = (factor.detach() for factor in self._factors())
        some = group.of_all(a.device)
        return split_a(a, self.experts)[some].to(dtype), split_b(b, self.experts)[some].to(dtype).contiguous()

    def no_gradients(self, expert: int | None, of_a: bool, of_b: bool) -> tuple[Tensor | None, Tensor | None]:
        """Zeros like A ``[experts, r, in]`` and B ``[experts, out, r]``, or like the factors of one expert.

        That of B is a view of memory in the order of the parameter.
        """
        a, b = self._factors()
        to_a = to_b = None
        if expert is not None:
            to_a = a.new_zeros(1, a.shape[0] // self.experts, a.shape[1]) if of_a else None
            to_b = b.new_zeros(1, b.shape[0], b.shape[1] // self.experts) if of_b else None
        else:
            to_a = split_a(torch.zeros_like(a.detach()), self.experts) if of_a else None
            to_b = split_b(torch.zeros_like(b.detach()), self.experts) if of_b else None
        return to_a, to_b

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A[self.adapter].weight, self.lora_B[self.adapter].weight

    def dense(self, experts: Sequence[int]) -> Tensor:
        """Compute adapted matrices whole, ``[len(experts), rows, columns]``, with gradients to the factors."""
        group = Group.of(experts)
        weights = self.decode_experts(group, self.compute_dtype)
        if not self.adapts:
            return weights
        a, b = self._factors()
        some = group.of_all(a.device)
        a, b = split_a(a, self.experts)[some], split_b(b, self.experts)[some]
        left, right = (a.mT, b.mT) if self.input_first else (b, a)
        with torch.autocast(weights.device.type, enabled=False):
            return torch.baddbmm(weights, left.to(weights.dtype), right.to(weights.dtype), alpha=self.scaling)


class _Forward:
    """One forward with an adapted parameter: what a `StackedWeight` multiplies with."""

    def __init__(self, layer: AdaptedParameter) -> None:
        self.layer, self.name = layer, layer.name
        self.compute_dtype, self.input_first = layer.compute_dtype, layer.input_first
        self._each: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def multiplied(self, x: Tensor, rows: Rows) -> Tensor:
        a, b = self.layer._factors()
        return self._apply(x, a, b, rows, None)

    def multiplied_by(self, expert: int, x: Tensor) -> Tensor:
        if self._each is None:  # views that share one gradient
            a, b = self.layer._factors()
            self._each = split_a(a, self.layer.experts).unbind(), split_b(b, self.layer.experts).unbind()
        a_of, b_of = (factors[expert] for factors in self._each)
        return self._apply(x, a_of, b_of, Rows.of_one(expert, len(x), self.layer.experts), expert)

    def _apply(self, x: Tensor, a: Tensor, b: Tensor, rows: Rows, expert: int | None) -> Tensor:
        device, dtype = x.device.type, self.compute_dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return _StackProduct.apply(x.to(dtype), a, b, self.layer, rows, expert)
        return _StackProduct.apply(x.to(dtype), a, b, self.layer, rows, expert)

    def dense(self, experts: Sequence[int]) -> Tensor:
        return self.layer.dense(experts)


def bound_experts(backbone: nn.Module, given: int | None) -> list[str]:
    """Set how many experts of every stack are decoded together, and say so.

    Parameters
    ----------
    given
        The number. None: it is chosen from the bytes (`lowrank_dist.quantization.stacks.experts_at_a_time`).

    Returns
    -------
    list of str
        One line for all stacks of one shape.
    """
    lines: dict[str, None] = {}
    for layer in backbone.modules():
        if not isinstance(layer, AdaptedParameter) or not layer.is_stack:
            continue
        partition, dtype = layer.partition, layer.compute_dtype
        layer.experts_at_a_time = experts_at_a_time(given, layer.experts, partition, dtype)
        nbytes = layer.experts_at_a_time * partition.rows * partition.columns * dtype.itemsize
        lines[
            f"{layer.parameter}: {layer.experts_at_a_time} of {layer.experts} experts of {partition.rows} x "
            f"{partition.columns} are decoded at a time ({nbytes / 2**20:.1f} MiB)"
            + ("; experts_at_a_time changes it" if given is None else "")
        ] = None
    return list(lines)
