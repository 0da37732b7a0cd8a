"""Flops of a training step, and those that a device does per second."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Counts the flops of the operators that run within it, backward included, by the formulas of ``torch``.

    These are products of matrices, convolutions and the fused attention of CUDA; other operators count 0. Unlike
    ``FlopCounterMode`` it adds no hooks to modules.

    Attributes
    ----------
    total : int
        Flops so far.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output


def matmul_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 20, budget: float = 0.5) -> float:
    """Flops per second of a product of large square matrices, 8192 wide on CUDA and 512 on other devices.

    The fastest of some products counts, after one to warm up.

    Parameters
    ----------
    device
        Where the matrices are; three of them take 0.4 GB in bf16 on CUDA, which are given back.
    dtype
        Of the matrices.
    repeats
        Largest number of products.
    budget
        Seconds after which no further product begins.
    """
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    # random, since a device computes zeros and ones faster; a generator of its own, since training has the global one
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(n, n, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = left @ right
    best, began = float("inf"), time.perf_counter()
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.matmul(left, right, out=out)
        if cuda:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > budget:
            break
    if cuda:
        del left, right, out
        torch.cuda.empty_cache()
    return 2 * n**3 / best
