"""Adapted linear layers as one product: the adapter is added to the decoded weight, ``y = x (W + s B A)^T``.

PEFT computes ``x W^T + s (x A^T) B^T``. The second term costs ``2 r (in + out)`` flops a token in memory-bound
products, and reads and writes y three more times. Added to the decoded weight, the adapter costs ``2 r in out`` flops
once in forward and once in backward, and nothing per token. It costs no pass over memory if the decoding kernel adds
it. Which way is faster depends on shape and tokens. The sum is rounded to the compute dtype, as the decoded weight is
in both ways.

``W + s B A`` is not kept: backward computes it again. The Function saves x and the parameters, as in
`lowrank_dist.layers.frozen` and for the same reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowrank_dist.layers.frozen import FrozenLinear

FoldAdapters = Literal["never", "always", "measured"]
"""Whether adapters are added to the decoded weight; see `Folding`."""

log = logging.getLogger(__name__)

_REPEATS = 3  # timed runs, separate and folded


class _FoldedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, base: FrozenLinear, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, *stored)
        ctx.scaling, ctx.base = scaling, base
        return x @ _summed(base, stored, a, b, scaling, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, *stored = ctx.saved_tensors
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _summed(ctx.base, tuple(stored), a, b, ctx.scaling, grad.dtype).mT
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            to_a = ((grad @ (ctx.scaling * b).to(grad.dtype)).mT @ x).to(a.dtype)
        if ctx.needs_input_grad[2]:
            to_b = (grad.mT @ (x @ (ctx.scaling * a).to(x.dtype).mT)).to(b.dtype)
        return to_x, to_a, to_b, None, None, *(None for _ in stored)


def _summed(
    base: FrozenLinear, stored: tuple[Tensor, ...], a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``(W + s B A)^T``, ``[in, out]``; a view where rows are outputs."""
    left, right = (a.mT, b.mT) if base.input_first else (b, a)
    product = (scaling * left).to(dtype), right.to(dtype)
    weight = base.residual.decode(base.by_name(stored), base.partition, dtype, product)
    return weight if base.input_first else weight.mT


class Folding:
    """Decides which layers of a model are computed as one product.

    Parameters
    ----------
    when
        ``"always"``, or ``"measured"``. If measured, forward and backward are timed both ways on the rank's own device
        the first time that a shape is used with a number of tokens (rounded up to a power of two), and the faster way
        is used from then on. Ranks may decide differently; their results then differ by rounding.

    Attributes
    ----------
    found : dict
        Milliseconds of the separate and the folded way, by (in, out, r, tokens).
    """

    def __init__(self, when: Literal["always", "measured"]) -> None:
        self.when = when
        self.found: dict[tuple[int, int, int, int], tuple[float, float]] = {}

    def folds(self, layer: FoldedLinear, x: Tensor) -> bool:
        """Whether to fold for this input, ``[..., in]``."""
        if self.when == "always":
            return True
        rank = layer.lora_A[layer.only_adapter].weight.shape[0]
        tokens = 1 << (max(1, x.numel() // x.shape[-1]) - 1).bit_length()
        key = (layer.in_features, layer.out_features, rank, tokens)
        if key not in self.found:
            self.found[key] = _measure(layer, x)
            log.info("%d -> %d, r = %d, %d tokens: %.3f ms separate, %.3f ms folded", *key, *self.found[key])
        separate, folded = self.found[key]
        return folded < separate


class FoldedLinear(LoraLinear):
    """PEFT's LoRA layer over a `FrozenLinear` that computes residual and adapter as one product if that is equivalent.

    Otherwise (dropout in training mode, disabled or several adapters, a variant such as DoRA) it uses PEFT's own
    forward.
    """

    folding: Folding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the compute dtype."""
        if args or kwargs or not self.is_one_product() or not self.folding.folds(self, x):
            return super().forward(x, *args, **kwargs)
        return self.folded(x)

    @property
    def only_adapter(self) -> str:
        (adapter,) = self.active_adapters
        return adapter

    def is_one_product(self) -> bool:
        """Whether the adapter can currently be added to the weight."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        adapter: str = self.only_adapter
        dropout = self.lora_dropout[adapter]
        return adapter not in self.lora_variant and not (
            isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        )

    def folded(self, x: Tensor) -> Tensor:
        """Compute the layer as one product."""
        adapter = self.only_adapter
        base: FrozenLinear = self.base_layer
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return base.multiplied(x, lambda x: _FoldedFunction.apply(x, a, b, self.scaling[adapter], base, *base.stored()))


def fold_adapters(backbone: nn.Module, when: FoldAdapters) -> list[FoldedLinear]:
    """Turn PEFT's layers over frozen ones into `FoldedLinear`, in place.

    Embeddings, experts, and layers whose B is more than a matrix (further parameters, a bias) are left as they are.
    """
    if when == "never":
        return []
    folding = Folding(when)
    layers: list[Any] = [
        module
        for module in backbone.modules()
        if type(module) is LoraLinear
        and isinstance(module.base_layer, FrozenLinear)
        and all(isinstance(b, nn.Linear) and b.bias is None for b in module.get_submodule("lora_B").children())
    ]
    for layer in layers:
        layer.__class__, layer.folding = FoldedLinear, folding
    return layers


def _measure(layer: FoldedLinear, x: Tensor) -> tuple[float, float]:
    """Milliseconds of forward and backward, separate and folded. The parameters must be gathered, as in a forward."""
    separate: Callable[[Tensor], Tensor] = super(FoldedLinear, layer).forward
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(forward: Callable[[Tensor], Tensor]) -> float:
        inputs = x.detach().requires_grad_()
        # Hides the saved tensors from activation checkpointing, which counts those saved inside it.
        with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
            started = _now(x.device)
            y = forward(inputs)
            torch.autograd.grad(y, [inputs, *trained], torch.ones_like(y))
            return _now(x.device) - started

    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(_REPEATS + 1):
        for folded, forward in ((False, separate), (True, layer.folded)):
            seconds = run(forward)
            if repeat > 0:  # the first run compiles and allocates
                times[folded].append(seconds)
    return 1e3 * min(times[False]), 1e3 * min(times[True])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
