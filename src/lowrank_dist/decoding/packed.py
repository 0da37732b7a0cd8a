"""Integers packed into words of 32 bits: GPTQ and AWQ.

Both store the transposed weight. GPTQ packs eight codes of four bits, or four of eight bits, along the inputs, and
``g_idx`` says which group an input belongs to (with ``desc_act`` in an order of its own). AWQ packs along the outputs,
in an order that its kernel wants. Zero points are packed along the outputs in both. A weight is
``scale * (code - zero)`` in the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from lowrank_dist.errors import ModelError
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader

WORD = 32
#: Place in a word of each code of AWQ.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: Tensor, bits: int, dim: int, places: Sequence[int] | None = None) -> Tensor:
    """Unsigned codes ``[..., n * 32 / bits, ...]`` of the words of `dim`, in int32; the first in the lowest bits.

    Code i of a word stands at place ``places[i]`` of it.
    """
    order = torch.tensor(range(WORD // bits) if places is None else places, dtype=torch.int32)
    shifts = (order * bits).view([-1, *[1] * (words.ndim - 1 - dim)])
    codes: Tensor = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    return codes.flatten(dim, dim + 1)


@dataclass(frozen=True, kw_only=True)
class GPTQMatrix(EncodedMatrix):
    """Tensors ``qweight``, ``qzeros``, ``scales`` and, unless the groups follow one another, ``g_idx``.

    Attributes
    ----------
    bits
        Of a code.
    group
        Inputs of a group, if there is no ``g_idx``.
    offset
        What is added to the stored zero points: 1 in the first version of the format.
    """

    bits: int
    group: int
    offset: int

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        outputs = slice(start, stop)
        each = WORD // self.bits
        codes = unpack(read(self.tensors[0], ALL, outputs), self.bits, 0)[: self.shape[1]]
        first, last = cover(start, stop, each)
        zeros = unpack(read(self.tensors[1], ALL, slice(first, last)), self.bits, 1) + self.offset
        zeros = zeros[:, start - first * each :][:, : stop - start]
        scales = read(self.tensors[2], ALL, outputs)
        if len(self.tensors) > 3:
            groups = read(self.tensors[3]).long()
            if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
                raise ModelError(
                    f"{self.tensors[3]}: names groups {int(groups.min())} to {int(groups.max())}, but there are "
                    f"{len(scales)}; fetch the model again"
                )
        else:
            groups = torch.arange(self.shape[1]) // self.group
        return _scaled(codes, zeros, scales, groups, self.dtype)


@dataclass(frozen=True, kw_only=True)
class AWQMatrix(EncodedMatrix):
    """Tensors ``qweight``, ``qzeros`` and ``scales``; `group` inputs of a group."""

    group: int

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        first, last = cover(start, stop, len(AWQ_PLACES))
        skipped = start - first * len(AWQ_PLACES)

        def codes(name: str) -> Tensor:
            words = read(name, ALL, slice(first, last))
            return unpack(words, 4, 1, AWQ_PLACES)[:, skipped : skipped + stop - start]

        scales = read(self.tensors[2], ALL, slice(start, stop))
        groups = torch.arange(self.shape[1]) // self.group
        return _scaled(codes(self.tensors[0]), codes(self.tensors[1]), scales, groups, self.dtype)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """``(codes - zeros) * scales`` of each input's group, transposed: ``[outputs, inputs]``.

    The differences are exact in fp32, and the product is rounded once, as in the dtype of the scales itself.
    """
    values = (codes - zeros[groups]).to(torch.float32)
    values *= scales.to(torch.float32)[groups]
    return values.to(dtype).mT.contiguous()


def find_gptq(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: gptq``: 4 and 8 bits, symmetric or not, with an order of activations or without."""
    bits = settings.integer("bits", low=1, high=32)
    if bits not in (2, 4, 8):
        raise refuse(reader.directory, f"GPTQ with {bits} bits")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise refuse(reader.directory, f"GPTQ's checkpoint_format={layout!r}")
    group = settings.integer("group_size", low=-1)
    name = f"GPTQ with {bits} bits{' and act-order' if settings.get('desc_act') else ''}"
    matrices: dict[str, EncodedMatrix] = {}
    for layer in layers_with(reader, ".qweight"):
        parts = Parts(reader, layer, name)
        words, outputs = _matrix(parts, ".qweight")
        inputs, each = words * WORD // bits, WORD // bits
        info = parts.info(".scales", FLOAT_DTYPES)
        size = inputs if group <= 0 else group
        parts.expect(".scales", FLOAT_DTYPES, (-(-inputs // size), outputs))
        parts.expect(".qzeros", ["I32"], (info.shape[0], -(-outputs // each)))
        names = [parts.name(suffix) for suffix in (".qweight", ".qzeros", ".scales")]
        if ".g_idx" in parts:
            parts.expect(".g_idx", ["I32", "I64"], (inputs,))
            names.append(parts.name(".g_idx"))
        elif settings.get("desc_act"):
            parts.info(".g_idx", ["I32"])  # raises: it is missing
        matrices[f"{layer}.weight"] = GPTQMatrix(
            shape=(outputs, inputs),
            dtype=float_dtype(info),
            tensors=tuple(names),
            bits=bits,
            group=size,
            offset=1 if layout == "gptq" else 0,
        )
    return Found(format=name, matrices=matrices)


def find_awq(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: awq``: 4 bits, in the layout for GEMM."""
    bits = settings.integer("bits" if "bits" in settings else "w_bit", low=1, high=32)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise refuse(reader.directory, f"AWQ with {bits} bits in the layout {version!r}")
    group = settings.integer("group_size" if "group_size" in settings else "q_group_size", low=-1)
    name = "AWQ with 4 bits"
    matrices: dict[str, EncodedMatrix] = {}
    for layer in layers_with(reader, ".qweight"):
        parts = Parts(reader, layer, name)
        inputs, words = _matrix(parts, ".qweight")
        outputs, size = words * len(AWQ_PLACES), inputs if group <= 0 else group
        groups = -(-inputs // size)
        info = parts.expect(".scales", FLOAT_DTYPES, (groups, outputs))
        parts.expect(".qzeros", ["I32"], (groups, words))
        matrices[f"{layer}.weight"] = AWQMatrix(
            shape=(outputs, inputs),
            dtype=float_dtype(info),
            tensors=tuple(parts.name(suffix) for suffix in (".qweight", ".qzeros", ".scales")),
            group=size,
        )
    return Found(format=name, matrices=matrices)


def _matrix(parts: Parts, suffix: str) -> tuple[int, int]:
    shape = parts.info(suffix, ["I32"]).shape
    if len(shape) != 2 or 0 in shape:
        raise parts.wrong(suffix, "a matrix")
    return shape[0], shape[1]
