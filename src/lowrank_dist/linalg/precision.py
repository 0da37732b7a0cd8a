"""Arithmetic in a stated precision, whatever the process has chosen and however a matrix is cut.

Without widened copies of whole matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements that are widened to fp64 at a time.
_PIECE = 2**18
# Rows of a matrix that are multiplied at a time where bits must not depend on the sharding. 256 of them take 1 to 16 %
# longer than all at once (2048^2, r = 64 to 4096^2, r = 128, one thread); 64 of them twice as much more.
_ROWS = 256


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


def minus_product(block: Tensor, left: Tensor, right: Tensor, *, scaling: float, rows: int, start: int) -> Tensor:
    """``W - scaling * left @ right`` in true fp32, the same bits however the rows of W are cut over ranks.

    A BLAS rounds a product according to its shape: one row alone, or the last rows of a block, come out otherwise than
    within a larger one. Rows are therefore multiplied 256 at a time, at places fixed in the whole matrix: all products
    have one shape, with zeros where rows are another rank's.

    Parameters
    ----------
    block
        This rank's rows of W, ``[m_p, n]`` fp32, row-sharded; zero rows are allowed.
    left
        ``[m_p, r]`` fp32, row-sharded alike.
    right
        ``[r, n]`` fp32, replicated.
    scaling
        Multiplies the product.
    rows
        m, the rows of all ranks together.
    start
        Index of this rank's first row.

    Returns
    -------
    Tensor
        ``[m_p, n]`` fp32, row-sharded; a new tensor. Where `right` is zero it is W, signs of zeros included. Nothing is
        communicated.

    Notes
    -----
    The bits are those of one BLAS on one kind of device. Memory: the result and two slabs of ``256 x n``.
    """
    if not bool(right.any()):
        return block.clone()
    out, stop, height = torch.empty_like(block), start + block.shape[0], min(_ROWS, rows)
    # Fresh and contiguous operands: some BLAS choose their kernels by strides and alignment too.
    scaled = torch.mul(right, -scaling, out=right.new_empty(right.shape))
    slab, product = left.new_empty(height, left.shape[1]), block.new_empty(height, block.shape[1])
    with full_fp32():
        for first in range(start // height * height, stop, height):
            low, high = max(first, start), min(first + height, stop)
            here, there = slice(low - start, high - start), slice(low - first, high - first)
            if high - low < height:
                slab.zero_()
            slab[there] = left[here]
            torch.mm(slab, scaled, out=product)
            torch.add(block[here], product[there], out=out[here])
    return out
