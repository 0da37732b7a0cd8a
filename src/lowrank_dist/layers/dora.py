"""DoRA's linear layer as one autograd Function: magnitude and direction apart, over a frozen encoded weight.

``y = x (m / ||W + s B A||_row . (W + s B A))^T`` with a trained magnitude m ``[out]`` (Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", ICML 2024, equation 5). The norm of a row is treated as a constant in backward
(section 4.3), as PEFT does.

PEFT forms B A for the norm, ``[out, in]``, and decodes the weight twice in forward. Here the norm comes from the weight
that the product has decoded, ::

    ||w + s b A||^2 = ||w||^2 + 2 s <w A^T, b> + s^2 b (A A^T) b^T

for a row w of W and b of B, which costs ``2 r in out`` flops and no matrix of the shape of W.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lowrank_dist.layers.frozen import FrozenLinear


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``||w + s b A||`` of every row, ``[out]`` fp32.

    Parameters
    ----------
    weight
        W, ``[out, in]``.
    a, b
        A ``[r, in]`` and B ``[out, r]``, in the dtype of `weight`.
    scaling
        s.
    """
    along = (weight @ a.mT).float()
    a, b = a.float(), b.float()
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    square += (b * (2 * scaling * along + scaling**2 * (b @ (a @ a.mT)))).sum(1)
    return square.clamp_(min=0).sqrt_()


class _DoraFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: nn.Parameter,
        b: nn.Parameter,
        magnitude: nn.Parameter,
        scaling: float,
        base: FrozenLinear,
    ) -> Tensor:
        rows, dtype = x.flatten(0, -2), x.dtype
        weight, a_, b_ = base.dense(dtype), a.to(dtype), b.to(dtype)
        factor = (magnitude.float() / row_norms(weight, a_, b_, scaling)).to(dtype)
        y = rows @ weight.mT
        y.addmm_(rows @ a_.mT, b_.mT, alpha=scaling).mul_(factor)
        y = y.view(*x.shape[:-1], y.shape[-1])
        ctx.save_for_backward(x, y, factor)
        ctx.how = a, b, magnitude, scaling, base
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, factor = ctx.saved_tensors
        a, b, magnitude, scaling, base = ctx.how
        wants_x, wants_a, wants_b, wants_m, *_ = ctx.needs_input_grad
        rows, dtype = x.flatten(0, -2), grad.dtype
        grad = grad.flatten(0, -2)
        to_x = to_a = to_b = to_m = None
        if wants_m:  # y / m is the direction's output, whose norm is a constant
            to_m = ((grad * y.flatten(0, -2)).sum(0, dtype=torch.float32) / magnitude.float()).to(magnitude.dtype)
        grad = grad * factor
        through_b = (grad @ b.to(dtype)).mul_(scaling)
        if wants_x:
            to_x = (grad @ base.dense(dtype)).addmm_(through_b, a.to(dtype)).view(x.shape)
        if wants_a:
            to_a = (through_b.mT @ rows).to(a.dtype)
        if wants_b:
            to_b = (grad.mT @ (rows @ a.to(dtype).mT).mul_(scaling)).to(b.dtype)
        return to_x, to_a, to_b, to_m, None, None


class DoraLinear(LoraLinear):
    """PEFT's DoRA layer over a `FrozenLinear`, computed by one autograd Function where that is equivalent.

    Otherwise it uses PEFT's own forward: with dropout in training mode, and with disabled, merged or several adapters.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the compute dtype."""
        if args or kwargs or x.dim() < 2 or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        base: FrozenLinear = self.base_layer
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        magnitude, scaling = self.lora_magnitude_vector[adapter].weight, self.scaling[adapter]
        return base.multiplied(x, lambda x: _DoraFunction.apply(x, a, b, magnitude, scaling, base))

    def is_plain(self) -> bool:
        """Whether the layer currently computes DoRA of one adapter and nothing else."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        dropout = self.lora_dropout[self.active_adapters[0]]
        return not (isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training)
