"""compressed-tensors: FP8 and INT8, packed integers, NVFP4 and MXFP4 (llm-compressor, vLLM, Kimi-K2).

The tensors say how a layer is stored: ``weight`` with ``weight_scale`` (FP8, INT8), or ``weight_packed`` with
``weight_shape`` (integers) or without (E2M1). ``config_groups`` say the bits and the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.decoding.encoded import (
    ALL,
    EncodedMatrix,
    Found,
    Parts,
    Read,
    cover,
    float_dtype,
    layers_with,
    refuse,
)
from lowrank_dist.decoding.fp4 import NV_GROUP, packed_groups
from lowrank_dist.decoding.packed import WORD, unpack
from lowrank_dist.decoding.scaled import combine, of_activations, scaled_matrix
from lowrank_dist.errors import ModelError
from lowrank_dist.quantization.elements import MX_GROUP
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.parse import Record, is_integer, printable
from lowrank_dist.storage.reader import CheckpointReader

_FORMATS = (
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"),
)


@dataclass(frozen=True, kw_only=True)
class PackedIntegers(EncodedMatrix):
    """Signed codes in words along the columns, times scales; `tensors` are words, scales, and zero points or order.

    Attributes
    ----------
    bits
        Of a code.
    grid, group
        Rows and columns of the scales, and columns that one is for.
    zero_points
        Whether there are zero points, packed along the rows.
    ordered
        Whether the last of `tensors` says which group a column belongs to.
    """

    bits: int
    grid: tuple[int, int]
    group: int
    zero_points: bool
    ordered: bool

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        signed = 2 ** (self.bits - 1)
        values = unpack(read(self.tensors[0], slice(start, stop), ALL), self.bits, 1)[:, : self.shape[1]] - signed
        values = values.to(torch.float32)
        groups = read(self.tensors[-1]).long() if self.ordered else None
        if groups is not None and bool((groups == -1).all()):  # declared, and not used
            groups = None
        if groups is not None and not 0 <= int(groups.min()) <= int(groups.max()) < self.grid[1]:
            raise ModelError(
                f"{self.tensors[-1]}: names groups {int(groups.min())} to {int(groups.max())}, but there are "
                f"{self.grid[1]}; fetch the model again"
            )
        scales = read(self.tensors[1], slice(start, stop)) if self.grid[0] > 1 else read(self.tensors[1])
        scales = scales.to(torch.float32).reshape(-1, self.grid[1]).expand(stop - start, -1)
        if self.zero_points:
            each = WORD // self.bits
            first, last = cover(start, stop, each)
            words = read(self.tensors[2], slice(first, last), ALL)
            zeros = unpack(words, self.bits, 0)[start - first * each :][: stop - start] - signed
            self._apply(values, zeros.to(torch.float32), groups, torch.Tensor.sub_)
        return self._apply(values, scales, groups, torch.Tensor.mul_).to(self.dtype)

    def _apply(self, values: Tensor, of_groups: Tensor, groups: Tensor | None, operation: Any) -> Tensor:
        if groups is None:
            return combine(values, of_groups, self.group, operation)
        operation(values, of_groups[:, groups])
        return values


def find(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: compressed-tensors``."""
    layout = settings.get("format") or "dense"
    if layout not in _FORMATS:
        raise refuse(reader.directory, f"compressed-tensors with format={printable(layout)!r}")
    sparsity = settings.record("sparsity_config").get("format")
    if sparsity not in (None, "dense"):
        raise refuse(reader.directory, f"compressed-tensors with sparsity {printable(repr(sparsity))}")
    if settings.record("transform_config").get("config_groups"):
        raise refuse(reader.directory, "compressed-tensors with transforms (rotations) of weights and activations")
    groups = [group.record("weights") for group in _groups(settings)]
    kinds: set[str] = set()
    matrices: dict[str, EncodedMatrix] = {}

    def add(layer: str, kind: str, matrix: EncodedMatrix) -> None:
        matrices[f"{layer}.weight"] = matrix
        kinds.add(kind)

    for layer in layers_with(reader, ".weight_packed"):
        parts = Parts(reader, layer, "compressed-tensors")
        if ".weight_shape" in parts:
            weights = _scheme(groups, parts, "int")
            add(layer, f"INT{weights['num_bits']}", _packed(parts, weights))
        elif ".weight_global_scale" in parts:
            name = ".weight_global_scale"
            matrix = packed_groups(
                parts, ".weight_packed", ".weight_scale", torch.bfloat16, whole=name, group=NV_GROUP, divided=True
            )
            add(layer, "NVFP4", matrix)
        else:
            matrix = packed_groups(parts, ".weight_packed", ".weight_scale", torch.bfloat16, whole=None, group=MX_GROUP)
            add(layer, "MXFP4", matrix)
    for layer in layers_with(reader, ".weight_scale"):
        parts = Parts(reader, layer, "compressed-tensors")
        if f"{layer}.weight" in matrices:
            continue
        code = parts.info(".weight", ["F8_E4M3", "F8_E5M2", "I8"]).dtype
        weights = _scheme(groups, parts, "int" if code == "I8" else "float")
        block = weights.get("block_structure") if weights.get("strategy") == "block" else None
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(is_integer(n, 1, 2**20) for n in block)
        ):
            raise weights.wrong("block_structure", "two positive integers")
        scaled = scaled_matrix(
            parts,
            ".weight_scale",
            None,
            block=None if block is None else (block[0], block[1]),
            zero_point=".weight_zero_point" if ".weight_zero_point" in parts else None,
            codes=(code,),
        )
        add(layer, "INT8" if code == "I8" else "FP8", scaled)
    name = f"compressed-tensors {' and '.join(sorted(kinds))}"
    unused = of_activations(reader)
    for suffix in ("_shape", "_zero_point"):  # zero points of symmetric weights are zeros
        for weight in layers_with(reader, suffix):
            if weight in matrices and f"{weight}{suffix}" not in matrices[weight].tensors:
                unused.add(f"{weight}{suffix}")
    return Found(format=name, matrices=matrices, unused=unused)


def _groups(settings: Record) -> list[Record]:
    groups = settings.record("config_groups")
    return [groups.record(name) for name in groups]


def _scheme(groups: list[Record], parts: Parts, kind: str) -> Record:
    """The settings of a layer's weights: those of the only group whose values are of this kind."""
    found = [weights for weights in groups if weights and weights.get("type", "int") == kind]
    distinct = {str([w.get(name) for name in ("num_bits", "strategy", "block_structure", "group_size")]) for w in found}
    if len(distinct) != 1:
        raise ModelError(
            f"{parts.reader.directory}: {parts.layer} is stored as {kind}, and config_groups have {len(distinct)} "
            "settings for such weights; one is decoded here. Pass the model that it was quantized from, or save it "
            "dense"
        )
    return found[0]


def _packed(parts: Parts, weights: Record) -> PackedIntegers:
    bits = weights.integer("num_bits", low=1, high=8)
    if bits not in (2, 4, 8):
        raise refuse(parts.reader.directory, f"{parts.layer} with {bits} bits, packed across words,")
    parts.expect(".weight_shape", ["I64", "I32"], (2,))
    rows, columns = (int(size) for size in parts.reader.part(parts.name(".weight_shape")))
    if not 0 < rows < 2**40 or not 0 < columns < 2**40:
        raise parts.wrong(".weight_shape", f"two sizes, not {rows} and {columns}")
    parts.expect(".weight_packed", ["I32"], (rows, -(-columns * bits // WORD)))
    scale = parts.info(".weight_scale", FLOAT_DTYPES)
    tensors = [parts.name(".weight_packed"), parts.name(".weight_scale")]
    if scale.shape in ((), (1,), (1, 1)):
        grid = (1, 1)
    elif scale.shape in ((rows,), (rows, 1)):
        grid = (rows, 1)
    elif len(scale.shape) == 2 and scale.shape[0] == rows:
        grid = (rows, scale.shape[1])
    else:
        raise parts.wrong(".weight_scale", f"one scale, or one for each of {rows} rows or of their groups")
    group = weights.integer("group_size", None, low=-1) or -1
    group = columns if grid[1] == 1 or group <= 0 else group
    if -(-columns // group) != grid[1]:
        raise parts.wrong(".weight_scale", f"a scale for each group of {group} of {columns} columns")
    zero_points = weights.get("symmetric") is False
    if zero_points:
        each = WORD // bits
        parts.expect(".weight_zero_point", ["I32"], (-(-rows // each), grid[1]))
        tensors.append(parts.name(".weight_zero_point"))
    ordered = ".weight_g_idx" in parts
    if ordered:
        parts.expect(".weight_g_idx", ["I32", "I64"], (columns,))
        tensors.append(parts.name(".weight_g_idx"))
    return PackedIntegers(
        shape=(rows, columns),
        dtype=float_dtype(scale),
        tensors=tuple(tensors),
        bits=bits,
        grid=grid,
        group=group,
        zero_points=zero_points,
        ordered=ordered,
    )
