"""Triton kernel that decodes NF4 in one pass over memory and adds the adapter's product in the same pass.

bitsandbytes reads the codes and writes the weight. Double-quantized maxima take four passes over the maxima before
that, and ``W + s B A`` two more over the weight. This kernel decodes a tile together with its maxima, adds the tile's
part of the product, accumulated in fp32, and writes the tile once. It reads 4.5 bits and writes 16 per weight, so the
write determines its time.

Tiles are constants, so that nothing is tuned at run time, and a run computes what the one before did. Triton keeps what
it compiles on disk (``TRITON_CACHE_DIR``), for all runs.

The module is imported on use only, because Triton comes with CUDA builds of torch. With ``TRITON_INTERPRET=1`` in the
environment before the first import of Triton, the kernel runs on the CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tiles without and with a product: the fastest of 8 and of 14 on an H200. For 28672 x 8192, r = 128, bf16 and double
#: quantization they take 0.17 and 0.44 ms; bitsandbytes takes 0.39 ms, and adding a product to its result 0.41 ms more.
TILES = (
    {"BM": 8, "BN": 512, "BK": 32, "num_warps": 4},
    {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4},
)


def decode(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    maps: tuple[Tensor, Tensor],
    *,
    shape: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    product: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Decode an NF4 matrix and optionally add a product of two thin matrices.

    Parameters
    ----------
    packed
        Flat uint8, two codes to a byte, the first in the upper half.
    absmax
        ``[blocks]`` fp32, or uint8 codes if `nested` is given.
    nested
        fp32: the offset of the double-quantized maxima, then the maximum of every 256 of them.
    maps
        Values of the 16 codes of weights and of the 256 codes of maxima, fp32.
    shape
        ``m, n``; n must be a multiple of `block_size`.
    block_size
        Number of elements that share a maximum.
    dtype
        fp32, bf16 or fp16, the dtype of the result. Sums are in fp32 and rounded once.
    product
        Left ``[m, r]`` and right ``[r, n]`` factor, both of one dtype, any strides. They are multiplied in that dtype
        (fp32 without tf32) and accumulated in fp32.

    Returns
    -------
    Tensor
        ``[m, n]``.
    """
    rows, columns = shape
    assert columns % block_size == 0, f"{columns} columns are not whole blocks of {block_size}"
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    left, right = (packed, packed) if product is None else product
    tile = TILES[product is not None]
    grid = (triton.cdiv(rows, tile["BM"]), triton.cdiv(columns, tile["BN"]))
    decode_kernel[grid](
        packed,
        absmax,
        absmax if nested is None else nested,
        *maps,
        left,
        right,
        out,
        rows,
        columns,
        0 if product is None else left.shape[1],
        *(0, 0, 0, 0) if product is None else (*left.stride(), *right.stride()),
        BLOCK=block_size,
        NESTED=nested is not None,
        PRODUCT=product is not None,
        GROUP=min(block_size, tile["BN"]),
        enable_fp_fusion=False,  # maxima are rounded between product and sum, as in bitsandbytes
        **tile,
    )
    return out


@triton.jit
def decode_kernel(
    packed,
    absmax,
    nested,
    code_map,
    absmax_map,
    left,
    right,
    out,
    rows,
    columns,
    rank,
    left_row,
    left_column,
    right_row,
    right_column,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    PRODUCT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Decode one ``BM x BN`` tile, as ``[BM, BN / GROUP, GROUP]``: a group is a block or the tile's part of one.

    Every maximum is looked up once for its group, and all elements of a row are known to be aligned.
    """
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    group = tl.program_id(1) * (BN // GROUP) + tl.arange(0, BN // GROUP)
    here = row[:, None] * (columns // GROUP) + group[None, :]
    inside = (row < rows)[:, None] & (group < columns // GROUP)[None, :]
    block = here // (BLOCK // GROUP)
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_map + code) * tl.load(nested + 1 + block // 256, mask=inside, other=0.0)
        scale += tl.load(nested)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)

    pair = here[:, :, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :]
    codes = tl.load(packed + pair, mask=inside[:, :, None], other=0).to(tl.int32)
    first = tl.load(code_map + (codes >> 4)) * scale[:, :, None]
    second = tl.load(code_map + (codes & 15)) * scale[:, :, None]
    weight = tl.interleave(first, second)

    if PRODUCT:
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, rank, BK):
            k = start + tl.arange(0, BK)
            of_left = left + row[:, None] * left_row + k[None, :] * left_column
            of_right = right + k[:, None] * right_row + column[None, :].to(tl.int64) * right_column
            total = tl.dot(
                tl.load(of_left, mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0),
                tl.load(of_right, mask=(k < rank)[:, None] & (column < columns)[None, :], other=0.0),
                total,
                input_precision="ieee",
            )
        weight += tl.reshape(total, (BM, BN // GROUP, GROUP))
    element = here[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    tl.store(out + element, weight.to(out.dtype.element_ty), mask=inside[:, :, None])
