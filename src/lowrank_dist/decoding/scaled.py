"""Values in FP8 or INT8 times a grid of scales: block scales, one for each row or group, or one for the tensor.

``weight`` holds the values. Its scales are ``weight_scale_inv`` (fine-grained FP8: DeepSeek-V3, Qwen3-FP8) or
``weight_scale`` (FBGEMM, ModelOpt; compressed-tensors, see `lowrank_dist.decoding.compressed_tensors`). In spite of the
first name, the weight is the product in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_dist.decoding.encoded import (
    ALL,
    FP8,
    EncodedMatrix,
    Found,
    Parts,
    Read,
    cover,
    float_dtype,
    layers_with,
    spread,
)
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.parse import Record, is_integer
from lowrank_dist.storage.reader import CheckpointReader

#: Dtypes of scales. The last is an exponent of two without sign and mantissa.
SCALES = (*FLOAT_DTYPES, "F8_E8M0")
#: Scales of activations and caches, which no weight needs.
OF_ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
    ".activation_scale_inv",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".input_global_scale",
)


@dataclass(frozen=True, kw_only=True)
class ScaledMatrix(EncodedMatrix):
    """``values * scales``, or ``(values - zero_points) * scales``, in fp32, rounded to `dtype`.

    Attributes
    ----------
    grid
        Shape of the scales, ``[rows of blocks, columns of blocks]``; the tensor may leave dimensions of size 1 out.
    block
        Rows and columns that a scale is for.
    zero_points
        Whether the third of `tensors` holds zero points in the shape of the scales.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    zero_points: bool = False

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        inside = () if entry is None else (entry,)
        values = read(self.tensors[0], *inside, slice(start, stop), ALL).to(torch.float32)
        first, last = cover(start, stop, self.block[0])

        def of_rows(name: str) -> Tensor:
            whole = read(name, *inside, slice(first, last)) if self.grid[0] > 1 else read(name, *inside)
            grid = whole.to(torch.float32).reshape(last - first, self.grid[1])
            return spread(grid, start, stop, self.block[0], 0)

        if self.zero_points:
            combine(values, of_rows(self.tensors[2]), self.block[1], torch.Tensor.sub_)
        return combine(values, of_rows(self.tensors[1]), self.block[1], torch.Tensor.mul_).to(self.dtype)


def combine(values: Tensor, of_blocks: Tensor, block: int, operation: object) -> Tensor:
    """Apply an operator in place to `values` ``[rows, n]`` and the ``[rows, blocks]`` of blocks of columns."""
    assert callable(operation)
    whole = values.shape[1] // block
    if whole:
        operation(values[:, : whole * block].view(len(values), whole, block), of_blocks[:, :whole, None])
    if whole * block < values.shape[1]:
        operation(values[:, whole * block :], of_blocks[:, whole:])
    return values


def scaled_matrix(
    parts: Parts,
    scale: str,
    dtype: torch.dtype | None,
    *,
    weight: str = ".weight",
    block: tuple[int, int] | None = None,
    zero_point: str | None = None,
    codes: tuple[str, ...] = FP8,
) -> ScaledMatrix:
    """Describe the matrix that is stored in `weight` and `scale`, and check their headers.

    Parameters
    ----------
    parts
        The tensors of the layer.
    scale, weight, zero_point
        Suffixes of their names.
    dtype
        The dtype to decode to; None: that of the scales.
    block
        Rows and columns of a block; None: one scale for each group of columns, each row, or the tensor.
    codes
        Dtypes that the values may have.

    Raises
    ------
    ModelError
        If shapes or dtypes do not go together.
    """
    shape = parts.info(weight, codes).shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise parts.wrong(weight, "a matrix or a stack of them")
    entries, (rows, columns) = shape[:-2], shape[-2:]
    info = parts.info(scale, SCALES)
    if block is not None:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        parts.expect(scale, SCALES, (*entries, *grid))
    else:
        if info.shape[: len(entries)] != entries:
            raise parts.wrong(scale, f"scales for each of {entries[0]} entries")
        given = info.shape[len(entries) :]
        if given in ((), (1,), (1, 1)):
            grid, block = (1, 1), (rows, columns)
        elif given in ((rows,), (rows, 1)):
            grid, block = (rows, 1), (1, columns)
        elif len(given) == 2 and given[0] == rows and given[1] > 0 and columns % given[1] == 0:
            grid, block = (rows, given[1]), (1, columns // given[1])
        else:
            raise parts.wrong(scale, f"one scale, one for each of {rows} rows, or equal groups of {columns} columns")
    tensors = [parts.name(weight), parts.name(scale)]
    if zero_point is not None:
        parts.expect(zero_point, ("I8", *codes), info.shape)
        tensors.append(parts.name(zero_point))
    return ScaledMatrix(
        shape=shape,
        dtype=dtype or (torch.bfloat16 if info.dtype == "F8_E8M0" else float_dtype(info)),
        tensors=tuple(tensors),
        grid=grid,
        block=block,
        zero_points=zero_point is not None,
    )


def find_fine_grained(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: fp8``: block scales, or one for each tensor, in tensors called ``..._scale_inv``."""
    found = settings.expect(
        "weight_block_size",
        lambda v: isinstance(v, list) and len(v) == 2 and all(is_integer(n, 1, 2**20) for n in v),
        "two positive integers",
        None,
    )
    block = None if found is None else (found[0], found[1])
    size = "a scale for each tensor" if block is None else f"block scales of {block[0]} x {block[1]}"
    name = f"FP8 with {size}"
    matrices: dict[str, EncodedMatrix] = {}
    for weight in layers_with(reader, "_scale_inv"):
        if weight.endswith(".activation"):
            continue
        parts = Parts(reader, weight, name)
        scalar = f"{weight}_scale_inv" in reader and reader.stored(f"{weight}_scale_inv").shape in ((), (1,), (1, 1))
        matrices[weight] = scaled_matrix(parts, "_scale_inv", dtype, weight="", block=None if scalar else block)
    return Found(format=name, matrices=matrices, unused=of_activations(reader))


def find_fbgemm(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: fbgemm_fp8``: a scale for each row."""
    name = "FP8 with a scale for each row"
    return Found(
        format=name,
        matrices={
            f"{layer}.weight": scaled_matrix(Parts(reader, layer, name), ".weight_scale", dtype)
            for layer in layers_with(reader, ".weight_scale")
        },
        unused=of_activations(reader),
    )


@dataclass(frozen=True, kw_only=True)
class NarrowedTensor(EncodedMatrix):
    """Values in fp64, rounded to fp32."""

    is_quantized: ClassVar[bool] = False

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        inside = () if entry is None else (entry,)
        return read(self.tensors[0], *inside, slice(start, stop)).to(self.dtype)


def find_fp64(reader: CheckpointReader) -> Found:
    """The tensors that are stored in fp64."""
    infos = {name: reader.stored(name) for name in reader}
    narrowed: dict[str, EncodedMatrix] = {
        name: NarrowedTensor(shape=info.shape, dtype=torch.float32, tensors=(name,))
        for name, info in infos.items()
        if info.dtype == "F64" and info.shape
    }
    return Found(format="fp64, rounded to fp32", matrices=narrowed)


def of_activations(reader: CheckpointReader) -> set[str]:
    """Names of the stored scales of activations and caches."""
    return {name for name in reader if name.endswith(OF_ACTIVATIONS)}
