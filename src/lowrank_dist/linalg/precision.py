"""Arithmetic in a fixed precision, independent of the process's settings and of how a matrix is sharded.

No function makes a widened copy of a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.linalg import vector_norm

# Squares that are summed in fp32 before fp64 takes over. From 4096 on the rounding is no longer random: 2e-8.
_SUMMED = 512
# Elements of a slab, for matrices that need not be in memory as a whole.
_SLAB = 2**21
# A vector register of a CPU holds at most this many elements; heights of slabs are multiples of it.
_STEP = 16
# Rows of a matrix that are multiplied at a time where the bits must not depend on the sharding. On one thread, blocks
# of 256 take 6 % (4096^2, r = 128) to 15 % (2048^2, r = 64) longer than all rows at once, blocks of 64 take 10 to 30 %.
# On a device, starting a product takes longer than computing so few rows.
_ROWS, _DEVICE_ROWS = 256, 1024
# Threads are worth starting from this number of flop of a product on, about a millisecond's.
_WORTH_THREADS = 10**8


@contextmanager
def full_fp32() -> Iterator[None]:
    """Compute matrix products inside the context in true fp32, without tf32 or bf16 passes.

    The process's own setting is restored at the end.

    See Also
    --------
    minus_product : A product whose bits do not depend on the sharding.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import full_fp32
    >>> with full_fp32():
    ...     torch.get_float32_matmul_precision()
    'highest'
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Whether `tf32_product` uses tf32 on this device."""
    return device.type == "cuda"


def tf32_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with operands rounded to tf32 (10 bits of mantissa) and sums in fp32; all fp32 without tf32.

    It is meant for power iterations, where such rounding hardly changes the resulting subspace.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norm(tensor: Tensor) -> Tensor:
    """Compute the squared Frobenius norm of a local tensor from sums of 512 squares in fp32.

    Parameters
    ----------
    tensor
        fp32 of any shape, this rank's part. Nothing is communicated.

    Returns
    -------
    Tensor
        fp64 scalar.

    See Also
    --------
    all_finite : Finds NaN and infinity without a mask.

    Notes
    -----
    The relative error is some 1e-7 for a few entries and 1e-9 for whole matrices. Entries below 1e-19 count as zero,
    those beyond 1e17 as infinite. On a CPU it takes a fifth to a third of the time of a sum in fp64 and no memory for a
    widened copy.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import squared_norm
    >>> squared_norm(torch.tensor([3.0, 4.0]))
    tensor(25., dtype=torch.float64)
    """
    flat = tensor.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    norms = [vector_norm(flat[:whole].view(-1, _SUMMED), dim=1, dtype=torch.float32)]
    norms.append(vector_norm(flat[whole:], dtype=torch.float32)[None])
    return torch.cat(norms).double().square().sum()


def all_finite(tensor: Tensor) -> bool:
    """Whether a local tensor holds neither NaN nor infinity, without memory for a mask.

    Parameters
    ----------
    tensor
        Floating point of any shape, possibly empty. Nothing is communicated.

    See Also
    --------
    squared_norm : Squared norm without a widened copy.

    Notes
    -----
    Only the minimum and the maximum are tested, because a NaN propagates to both. On a CPU this takes a seventeenth of
    the time of ``torch.isfinite(tensor).all()``.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import all_finite
    >>> all_finite(torch.ones(3)), all_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@contextmanager
def single_threads() -> Iterator[int]:
    """Run every product on the CPU inside the context on one thread; yields the number of threads of the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def slabs(block: Tensor, numel: int = _SLAB) -> list[slice]:
    """Divide the rows of a matrix into slices of about `numel` elements each.

    Parameters
    ----------
    block
        ``[m, n]``, possibly without rows.
    numel
        Elements of a slice.

    Returns
    -------
    list of slice
        Equally high except for the last one. Heights above 16 rows are multiples of 16, because a product with an odd
        number of rows takes 3 % longer.

    See Also
    --------
    minus_product : Works on slices at fixed places of the whole matrix.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import slabs
    >>> slabs(torch.zeros(100, 8), numel=256)
    [slice(0, 48, None), slice(48, 96, None), slice(96, 100, None)]
    """
    count = max(round(block.numel() / numel), 1)
    height = -(-len(block) // count)
    if height > _STEP:
        height = -(-height // _STEP) * _STEP
    return [slice(first, min(first + height, len(block))) for first in range(0, len(block), max(height, 1))]


def minus_product(
    block: Tensor, left: Tensor, right: Tensor, *, scaling: float, rows: int, start: int, out: Tensor | None = None
) -> Tensor:
    """Compute ``W - scaling * left @ right`` in true fp32, with bits that do not depend on how W is sharded.

    The rounding of a BLAS depends on the shape of the product: one row alone, or the last rows of a block, are rounded
    differently within a larger block. Rows are therefore multiplied 256 at a time (1024 on CUDA), at fixed places of
    the whole matrix, so that all products have one shape; rows of other ranks are zero. On the CPU every product takes
    one thread and several run at a time, because the rounding of a BLAS also depends on the number of its threads.

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
        ``[m_p, n]`` fp32, row-sharded; `out` if given. If `right` is zero the result is W, signs of zeros included.
        Nothing is communicated.

    See Also
    --------
    full_fp32 : True fp32 for other products.

    Notes
    -----
    The bits are the same for one BLAS on one kind of device. Memory is that of the result and of two slabs of 256 (or
    1024) rows for every thread.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.linalg import minus_product
    >>> w, b, a = torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3)
    >>> minus_product(w, b, a, scaling=0.5, rows=2, start=0)
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    out = torch.empty_like(block) if out is None else out
    if not bool(right.any()):
        return out.copy_(block)
    on_cpu = block.device.type == "cpu"
    stop, height = start + block.shape[0], min(_ROWS if on_cpu else _DEVICE_ROWS, rows)
    # Operands are new and contiguous because some BLAS choose their kernels by strides and alignment too.
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
