"""Arithmetic in a stated precision, whatever the process has chosen and however a matrix is cut.

Without widened copies of whole matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.linalg import vector_norm

# Squares that are summed in fp32 before fp64 takes over. Of 4096 and more the rounding is no longer random: 2e-8.
_SUMMED = 512
# Elements of a matrix that are there at a time, where not all need be.
_SLAB = 2**21
# Vectors of a CPU hold so many elements at most: heights of slabs are multiples of it.
_STEP = 16
# Rows of a matrix that are multiplied at a time where bits must not depend on the sharding. On one thread 256 of them
# take 6 % (4096^2, r = 128) to 15 % (2048^2, r = 64) longer than all at once, 64 of them 10 to 30 %. On a device
# it takes longer to start a product than to compute so few rows.
_ROWS, _DEVICE_ROWS = 256, 1024
# flop of a product from which on it is worth starting threads, about a millisecond's.
_WORTH_THREADS = 10**8


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products in true fp32 inside (no tf32, no bf16 passes), whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Whether `tf32_product` is anything else than a product in fp32."""
    return device.type == "cuda"


def tf32_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, its operands rounded to tf32 (10 bits of mantissa) and summed in fp32; without tf32, in fp32.

    For power iterations, whose errors the subspace that comes out of them forgives.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norm(tensor: Tensor) -> Tensor:
    """Squared Frobenius norm of the local `tensor`, a scalar in fp64, from sums of 512 squares in fp32.

    Relative error some 1e-7 for a few entries, 1e-9 for whole matrices; entries below 1e-19 count as zero, and what is
    beyond 1e17 as infinite. On a CPU a fifth to a third of the time of a sum in fp64, with no memory to widen it.
    """
    flat = tensor.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    norms = [vector_norm(flat[:whole].view(-1, _SUMMED), dim=1, dtype=torch.float32)]
    norms.append(vector_norm(flat[whole:], dtype=torch.float32)[None])
    return torch.cat(norms).double().square().sum()


def all_finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither NaN nor infinity, with no memory for a mask.

    From its extremes, which a NaN takes over: on a CPU a seventeenth of the time of ``torch.isfinite(tensor).all()``.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@contextmanager
def single_threads() -> Iterator[int]:
    """Products on the CPU take one thread each inside; how many threads the process has, to run that many at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def slabs(block: Tensor, numel: int = _SLAB) -> list[slice]:
    """Slices of the rows of a matrix, of some `numel` elements each: for what need not be there as a whole.

    They are equally high, and by 16 rows where there are as many: with odd ones a product takes 3 % longer.
    """
    count = max(round(block.numel() / numel), 1)
    height = -(-len(block) // count)
    if height > _STEP:
        height = -(-height // _STEP) * _STEP
    return [slice(first, min(first + height, len(block))) for first in range(0, len(block), max(height, 1))]


def minus_product(
    block: Tensor, left: Tensor, right: Tensor, *, scaling: float, rows: int, start: int, out: Tensor | None = None
) -> Tensor:
    """``W - scaling * left @ right`` in true fp32, the same bits however the rows of W are cut over ranks.

    A BLAS rounds a product according to its shape: one row alone, or the last rows of a block, come out otherwise than
    within a larger one. Rows are therefore multiplied 256 at a time (1024 on CUDA), at places fixed in the whole
    matrix: all products have one shape, with zeros where rows are another rank's. On the CPU each takes one thread, and
    several run at a time: a BLAS that shares a product among threads rounds according to their number too.

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
    out
        Where the result is written; by default a new tensor.

    Returns
    -------
    Tensor
        ``[m_p, n]`` fp32, row-sharded; `out`, or a new tensor. Where `right` is zero it is W, signs of zeros included.
        Nothing is communicated.

    Notes
    -----
    The bits are those of one BLAS on one kind of device. Memory: the result, and two slabs of so many rows for every
    thread.
    """
    out = torch.empty_like(block) if out is None else out
    if not bool(right.any()):
        return out.copy_(block)
    on_cpu = block.device.type == "cpu"
    stop, height = start + block.shape[0], min(_ROWS if on_cpu else _DEVICE_ROWS, rows)
    # Fresh and contiguous operands: some BLAS choose their kernels by strides and alignment too.
    scaled = torch.mul(right, -scaling, out=right.new_empty(right.shape))

    slabs = range(start // height * height, stop, height)

    def subtract(some: range) -> None:
        slab, product = left.new_empty(height, left.shape[1]), block.new_empty(height, block.shape[1])
        for first in some:
            low, high = max(first, start), min(first + height, stop)
            here, there = slice(low - start, high - start), slice(low - first, high - first)
            if high - low < height:
                slab.zero_()
            slab[there] = left[here]
            torch.mm(slab, scaled, out=product)
            torch.add(block[here], product[there], out=out[here])

    with full_fp32(), single_threads() as threads:
        shared = on_cpu and 2 * block.numel() * right.shape[0] > _WORTH_THREADS
        workers = min(threads, len(slabs)) if shared else 1
        if workers < 2:
            subtract(slabs)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(subtract, [slabs[worker::workers] for worker in range(workers)]))
    return out
