"""Adapted linear layers as one autograd Function: frozen weight and adapter, ``y = x W^T + s (x A^T) B^T``.

PEFT computes it with three modules, and autograd keeps the input of each and the product of the first two. The Function
here saves x and computes ``x A^T`` again in backward: ``2 r in`` flops a token, which is a share of ``r / out`` of the
layer. The adapter's term is added to the first product in place. Parameters are kept as objects, whose data ZeRO-3
gathers again before the backward, and not as saved tensors: gradient checkpointing visits every saved tensor three
times.

It can also be computed as one product, ``y = x (W + s B A)^T`` (`Folding`). The separate term costs ``2 r (in + out)``
flops a token. Added to the decoded weight, the adapter costs ``2 r in out`` flops once in forward and once in backward,
and nothing per token. It costs no pass over memory if the decoding kernel adds it. Which way is faster depends on shape
and tokens. The sum is rounded to the compute dtype, as the decoded weight is in both ways. It is not kept: backward
computes it again.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowrank_dist.layers.dora import DoraLinear
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.model.plan import is_dora

FoldAdapters = Literal["never", "always", "measured"]
"""Whether adapters are added to the decoded weight; see `Folding`."""

log = logging.getLogger(__name__)

_REPEATS = 3  # timed runs, separate and folded


class _AdaptedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: nn.Parameter, b: nn.Parameter, how: tuple[FrozenLinear, float, bool]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = a, b, how
        base, scaling, fold = how
        rows, dtype = x.flatten(0, -2), x.dtype
        weight = base.used(dtype, _product(base, a, b, scaling, dtype) if fold else None)
        # the result is no view of another tensor, so that models can change it in place
        result = x.new_empty(*x.shape[:-1], weight.shape[1])
        y = result.view(rows.shape[0], weight.shape[1])
        torch.mm(rows, weight, out=y)
        if not fold:
            y.addmm_(rows @ _in(a, dtype).mT, _in(b, dtype).mT, alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        a, b, (base, scaling, fold) = ctx.how
        wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        rows, dtype = x.flatten(0, -2), grad.dtype
        grad, weight = grad.flatten(0, -2), base.recomputed(dtype)
        to_x = to_a = to_b = None
        if wants_a or not fold:
            through_b = _scaled(grad @ _in(b, dtype), scaling)
        if wants_x:
            if weight is None:
                weight = base.matrix(dtype, _product(base, a, b, scaling, dtype) if fold else None)
            to_x = grad @ weight.mT
            if not fold:
                to_x.addmm_(through_b, _in(a, dtype))
            to_x = to_x.view(x.shape)
        if wants_a:
            to_a = _in(through_b.mT @ rows, a.dtype)
        if wants_b:
            to_b = _in(grad.mT @ _scaled(rows @ _in(a, dtype).mT, scaling), b.dtype)
        return to_x, to_a, to_b, None


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call of torch where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1 else tensor.mul_(scaling)


def _product(base: FrozenLinear, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of ``s B A`` in the orientation of the stored matrix."""
    left, right = (a.mT, b.mT) if base.input_first else (b, a)
    return _in(scaling * left, dtype), _in(right, dtype)


class Folding:
    """Decides which layers of a model are computed as one product.

    Parameters
    ----------
    when
        ``"never"``, ``"always"``, or ``"measured"``. If measured, forward and backward are timed both ways on the
        rank's own device the first time that a shape is used with a number of tokens (rounded up to a power of two),
        and the faster way is used from then on. Ranks may decide differently; their results then differ by rounding.

    Attributes
    ----------
    found : dict
        Milliseconds of the separate and the folded way, by (in, out, r, tokens).
    """

    def __init__(self, when: FoldAdapters) -> None:
        self.when = when
        self.found: dict[tuple[int, int, int, int], tuple[float, float]] = {}

    def folds(self, layer: AdaptedLinear, x: Tensor) -> bool:
        """Whether to fold for this input, ``[..., in]``."""
        if self.when != "measured":
            return self.when == "always"
        rank = layer.lora_A[layer.active_adapters[0]].weight.shape[0]
        tokens = 1 << (max(1, x.numel() // x.shape[-1]) - 1).bit_length()
        key = (layer.in_features, layer.out_features, rank, tokens)
        if key not in self.found:
            self.found[key] = _measure(layer, x)
            log.info("%d -> %d, r = %d, %d tokens: %.3f ms separate, %.3f ms folded", *key, *self.found[key])
        separate, folded = self.found[key]
        return folded < separate


class AdaptedLinear(LoraLinear):
    """PEFT's LoRA layer over a `FrozenLinear`, computed by one autograd Function where that is equivalent.

    Otherwise it uses PEFT's own forward: with dropout in training mode, with disabled or several adapters, with a
    variant such as DoRA, and if one of the modules that the Function passes over has forward hooks.
    """

    folding: Folding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the compute dtype."""
        if args or kwargs or x.dim() < 2 or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        return self.computed(x, fold=self.folding.folds(self, x))

    def is_plain(self) -> bool:
        """Whether the layer currently computes ``x W^T + s (x A^T) B^T`` and nothing else."""
        active = self.active_adapters
        if len(active) != 1 or self.disable_adapters or self.merged_adapters or active[0] in self.lora_variant:
            return False
        base, a, b, dropout = self._parts(active[0])
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
            return False
        return not (
            base._forward_hooks
            or base._forward_pre_hooks
            or a._forward_hooks
            or a._forward_pre_hooks
            or b._forward_hooks
            or b._forward_pre_hooks
        )

    def computed(self, x: Tensor, *, fold: bool) -> Tensor:
        """Compute the layer by the Function, as one product if `fold`."""
        (adapter,) = self.active_adapters
        base, a, b, _ = self._parts(adapter)
        how = base, self.scaling[adapter], fold
        return base.multiplied(x, _AdaptedFunction, a._parameters["weight"], b._parameters["weight"], how)

    def _parts(self, adapter: str) -> tuple[Any, Any, Any, Any]:
        """The frozen layer, A, B and the dropout; ``getattr`` of a module is a Python function, seven times a call."""
        modules: dict[str, Any] = self._modules
        return (
            modules["base_layer"],
            modules["lora_A"]._modules[adapter],
            modules["lora_B"]._modules[adapter],
            modules["lora_dropout"]._modules[adapter],
        )


def fuse_adapters(backbone: nn.Module, fold: FoldAdapters) -> list[AdaptedLinear]:
    """Turn PEFT's layers over frozen ones into `AdaptedLinear`, in place, and return them.

    Layers of DoRA become `lowrank_dist.layers.dora.DoraLinear`, which is never folded. Embeddings, experts, and layers
    whose B is more than a matrix (further parameters, a bias) are left as they are.
    """
    folding = Folding(fold)
    layers: list[Any] = [
        module
        for module in backbone.modules()
        if type(module) is LoraLinear
        and isinstance(module.base_layer, FrozenLinear)
        and all(isinstance(b, nn.Linear) and b.bias is None for b in module.get_submodule("lora_B").children())
    ]
    for layer in layers:
        if is_dora(layer):
            layer.__class__ = DoraLinear
        else:
            layer.__class__, layer.folding = AdaptedLinear, folding
    return [layer for layer in layers if isinstance(layer, AdaptedLinear)]


def _measure(layer: AdaptedLinear, x: Tensor) -> tuple[float, float]:
    """Milliseconds of forward and backward, separate and folded. The parameters must be gathered, as in a forward."""
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(fold: bool) -> float:
        inputs = x.detach().requires_grad_()
        # Hides the saved tensors from activation checkpointing, which counts those saved inside it.
        with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
            started = _now(x.device)
            y = layer.computed(inputs, fold=fold)
            torch.autograd.grad(y, [inputs, *trained], torch.ones_like(y))
            return _now(x.device) - started

    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(_REPEATS + 1):
        for fold in (False, True):
            seconds = run(fold)
            if repeat > 0:  # the first run compiles and allocates
                times[fold].append(seconds)
    return 1e3 * min(times[False]), 1e3 * min(times[True])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
