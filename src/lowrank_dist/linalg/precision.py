"""Arithmetic in a stated precision, whatever the process has chosen and without widened copies of whole matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements that are widened to fp64 at a time.
_PIECE = 2**18


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products in true fp32 inside (no tf32, no bf16 passes), whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norm(tensor: Tensor) -> Tensor:
    """Squared Frobenius norm of the local `tensor`, a scalar in fp64; memory for a small piece of it in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for piece in torch.split(tensor.reshape(-1), _PIECE):
        wide = piece.double()
        total += wide @ wide
    return total
