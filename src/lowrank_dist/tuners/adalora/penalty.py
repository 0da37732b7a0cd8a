"""AdaLoRA's penalty on factors that are not orthonormal, where ZeRO-3 has gathered them.

PEFT adds it to the loss of the model's output by a walk over all parameters, which are empty at that time. Here a layer
computes its own term in its forward, and the model adds the terms to the loss of its output. The gradient of a term is
formed in the layer's backward, times the factor by which the loss was multiplied for backward: that of accumulation, of
a mean over tokens, or of anything else. The backward of the loss, which comes first, finds out this factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.model.names import ADAPTER
from lowrank_dist.tuners.adalora.layers import adalora_layers


class OrthogonalityPenalty:
    """The mean of ``|P^T P - I|`` and ``|Q Q^T - I|`` (Frobenius norms) over the factors of all layers, times a weight.

    As in the authors' code, it is added in training only; PEFT adds it to the loss of an evaluation too. It is computed
    in fp32 under every precision. Without a loss in the model's output, there is no penalty.

    Parameters
    ----------
    weight
        ``orth_reg_weight``.

    Attributes
    ----------
    weight
        Weight of one term, once the penalty has been added to a model.
    terms
        The terms of the forward that runs; None outside of it.
    factor
        Gradient of what backward began with, with respect to the loss of the output; None before its backward.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.terms: list[Tensor] | None = None
        self.factor: Tensor | None = None

    def add_to(self, backbone: nn.Module) -> None:
        """Add hooks to a model with PEFT's layers, and to the layers."""
        layers: list[Any] = adalora_layers(backbone)
        self.weight /= 2 * len(layers)
        backbone.register_forward_pre_hook(self._begins)
        backbone.register_forward_hook(self._ends)
        for layer in layers:
            layer.register_forward_hook(self._of_layer)

    def _begins(self, module: nn.Module, args: Any) -> None:
        self.factor, self.terms = None, [] if module.training and torch.is_grad_enabled() else None

    def _of_layer(self, layer: Any, args: Any, output: Tensor) -> Tensor:
        # without gradients in the first forward of a layer that is recomputed, if it is the reentrant way
        if layer.disable_adapters or not layer.training or (self.terms is None and not torch.is_grad_enabled()):
            return output
        penalized: Tensor = _Penalized.apply(output, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], self)
        return penalized

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        terms, self.terms = self.terms, None
        if terms and isinstance(getattr(output, "loss", None), Tensor):
            output.loss = _WithPenalty.apply(output.loss, self.weight * torch.stack(terms).sum(), self)


class _WithPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, penalty: OrthogonalityPenalty) -> Tensor:
        ctx.penalty = penalty
        return loss + value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.penalty.factor = grad
        return grad, None, None


class _Penalized(torch.autograd.Function):
    """The identity of a layer's output; its backward adds the gradient of the layer's term to that of the factors.

    Parameters are kept as objects, which ZeRO-3 gathers again before the backward, as in
    `lowrank_dist.layers.adapted`.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: nn.Parameter, b: nn.Parameter, penalty: OrthogonalityPenalty) -> Tensor:
        ctx.how = a, b, penalty
        if penalty.terms is not None:  # None where gradient checkpointing runs the layer again
            with torch.autocast(y.device.type, enabled=False):
                penalty.terms += [torch.linalg.matrix_norm(_excess(a)), torch.linalg.matrix_norm(_excess(b.mT))]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, penalty = ctx.how
        if penalty.factor is None:
            return grad, None, None, None
        with torch.autocast(grad.device.type, enabled=False):
            weight = penalty.weight * penalty.factor.float()
            return grad, weight * _gradient(a).to(a.dtype), weight * _gradient(b.mT).mT.to(b.dtype), None


def _excess(rows: Tensor) -> Tensor:
    """``R R^T - I`` for R ``[r, n]``, in fp32."""
    rows = rows.detach().float()
    gram = rows @ rows.mT
    gram.diagonal().sub_(1)
    return gram


def _gradient(rows: Tensor) -> Tensor:
    """Gradient of the Frobenius norm of `_excess`, ``[r, n]`` fp32; 0 where the norm is 0, as torch has it."""
    excess = _excess(rows)
    norm = torch.linalg.matrix_norm(excess)
    return (2 * excess / torch.where(norm > 0, norm, 1.0)) @ rows.detach().float()
