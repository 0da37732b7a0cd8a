"""Four-bit floating point (E2M1) in groups with a scale: MXFP4 (gpt-oss, compressed-tensors) and NVFP4.

A byte holds two codes, the first in its low half. A group of MXFP4 is 32 elements with an exponent of two in a byte.
One of NVFP4 is 16 elements with a scale in FP8, and the tensor has a scale in fp32 beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.decoding.encoded import ALL, FP8, EncodedMatrix, Found, Parts, Read, cover, layers_with, refuse
from lowrank_dist.decoding.scaled import of_activations, scaled_matrix
from lowrank_dist.quantization.elements import MX_GROUP, exponential, unpacked
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader

NV_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class PackedGroups(EncodedMatrix):
    """``[rows, columns / 2]`` bytes and ``[rows, groups]`` scales.

    Attributes
    ----------
    group
        Columns of a group.
    exponents
        Whether the scales are exponents of two in a byte.
    divided
        Whether the scale of the tensor, the third of `tensors`, divides instead of multiplying (compressed-tensors).
    """

    group: int
    exponents: bool = False
    divided: bool = False

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        values = unpacked(read(self.tensors[0], slice(start, stop), ALL))
        stored = read(self.tensors[1], slice(start, stop), ALL)
        scales = exponential(stored) if self.exponents else stored.to(torch.float32)
        if len(self.tensors) > 2:
            whole = read(self.tensors[2]).to(torch.float32).reshape(())
            scales = scales / whole if self.divided else scales * whole
        in_groups = values.view(stop - start, -1, self.group)
        in_groups *= scales[:, :, None]
        return values.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class StackedBlocks(EncodedMatrix):
    """gpt-oss: bytes ``[entries, columns, groups, 16]`` and exponents ``[entries, columns, groups]``.

    The groups run along the rows of the decoded ``[entries, rows, columns]``: rows that are not whole groups read the
    groups at their ends whole.
    """

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        assert entry is not None  # the reader takes stacks apart
        first, last = cover(start, stop, MX_GROUP)
        values = unpacked(read(self.tensors[0], entry, ALL, slice(first, last)))
        scales = exponential(read(self.tensors[1], entry, ALL, slice(first, last)))
        values *= scales[:, :, None]
        skipped = start - first * MX_GROUP
        return values.flatten(1)[:, skipped : skipped + stop - start].to(self.dtype).mT.contiguous()


def find_stacked(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: mxfp4``: the experts of gpt-oss, in tensors called ``..._blocks`` and ``..._scales``."""
    name, matrices = "MXFP4", dict[str, EncodedMatrix]()
    for stack in layers_with(reader, "_blocks"):
        parts = Parts(reader, stack, name)
        shape = parts.info("_blocks", ["U8"]).shape
        if len(shape) != 4 or 0 in shape or shape[3] != MX_GROUP // 2:
            raise parts.wrong("_blocks", f"[experts, columns, groups, {MX_GROUP // 2}]")
        parts.expect("_scales", ["U8"], shape[:3])
        matrices[stack] = StackedBlocks(
            shape=(shape[0], shape[2] * MX_GROUP, shape[1]),
            dtype=dtype,
            tensors=(parts.name("_blocks"), parts.name("_scales")),
        )
    return Found(format=name, matrices=matrices)


def packed_groups(
    parts: Parts, weight: str, scale: str, dtype: torch.dtype, *, whole: str | None, group: int, divided: bool = False
) -> PackedGroups:
    """Describe a matrix of packed codes, and check the headers; `whole` is the suffix of the scale of the tensor."""
    shape = parts.info(weight, ["U8"]).shape
    if len(shape) != 2 or 0 in shape or shape[1] * 2 % group:
        raise parts.wrong(weight, f"[rows, columns / 2] with groups of {group} columns")
    exponents = whole is None
    parts.expect(scale, ["U8", "F8_E8M0"] if exponents else FP8, (shape[0], shape[1] * 2 // group))
    if exponents and parts.reader.stored(parts.name(scale)).dtype != "U8":
        exponents = False  # torch knows these exponents as a floating-point type
    if whole is not None:
        parts.scalar(whole, ["F32"])
    return PackedGroups(
        shape=(shape[0], shape[1] * 2),
        dtype=dtype,
        tensors=tuple(parts.name(suffix) for suffix in (weight, scale, whole) if suffix is not None),
        group=group,
        exponents=exponents,
        divided=divided,
    )


def find_modelopt(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """NVIDIA ModelOpt, ``quant_method: modelopt``: NVFP4 and FP8, told apart by their tensors."""
    algorithm = settings.get("quant_algo")
    if algorithm not in ("NVFP4", "FP8", None):
        raise refuse(reader.directory, f"ModelOpt's {algorithm!r}")
    nvfp4 = set(layers_with(reader, ".weight_scale_2"))
    matrices: dict[str, EncodedMatrix] = {}
    for layer in layers_with(reader, ".weight_scale"):
        if layer in nvfp4:
            parts = Parts(reader, layer, "ModelOpt NVFP4")
            matrices[f"{layer}.weight"] = packed_groups(
                parts, ".weight", ".weight_scale", dtype, whole=".weight_scale_2", group=NV_GROUP
            )
        else:
            matrices[f"{layer}.weight"] = scaled_matrix(Parts(reader, layer, "ModelOpt FP8"), ".weight_scale", dtype)
    name = f"ModelOpt {'NVFP4' if nvfp4 else 'FP8'}"
    return Found(format=name, matrices=matrices, unused=of_activations(reader))
