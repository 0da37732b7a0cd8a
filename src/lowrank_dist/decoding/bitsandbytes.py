"""bitsandbytes: NF4 and FP4 with block maxima, nested or not, and LLM.int8 with a scale for each row.

Beside the codes ``weight`` of a 4-bit layer are the maxima ``weight.absmax``, the code book ``weight.quant_map`` and a
JSON text, ``weight.quant_state.bitsandbytes__nf4`` or ``__fp4``. The maxima are fp32, or nested: 8-bit codes of
``weight.nested_quant_map`` times maxima of their own, plus an offset. Blocks run over the flattened matrix. A layer of
LLM.int8 is ``weight`` (INT8) and ``SCB``, the maximum of each row; a code is a 127th of it.
"""

from __future__ import annotations

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
    layers_with,
    spread,
)
from lowrank_dist.errors import CheckpointError
from lowrank_dist.quantization.elements import from_int8
from lowrank_dist.quantization.state import read_quant_state
from lowrank_dist.storage.dtypes import DTYPES, NAMED_DTYPES
from lowrank_dist.storage.layout import QUANT_STATES
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader

_STATES = {kind: QUANT_STATES[kind] for kind in ("nf4", "fp4")}
_STORAGES = ("U8", "BF16", "F16", "F32")
_MAX_STATE = 2**16  # bytes
_SMALL_BOOK, _BOOK = 16, 256  # codes of 4 and of 8 bits


@dataclass(frozen=True, kw_only=True)
class FourBitMatrix(EncodedMatrix):
    """Codes times block maxima in fp32, rounded to `dtype`; `tensors` are codes, maxima, code book, nested ones.

    Attributes
    ----------
    block
        Elements of a block.
    storage
        Bytes of a stored element; more than one if the codes are stored as another dtype (``bnb_4bit_quant_storage``).
    nested_block, offset
        Maxima of a nested block, and the number that is added to them; None if they are not nested.
    """

    block: int
    storage: int
    nested_block: int | None = None
    offset: float | None = None

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        width = self.shape[1]
        low, high = start * width, stop * width
        codes = self._codes(read, *cover(low, high, 2))[low % 2 :][: high - low].to(torch.int32)
        book = read(self.tensors[2]).flatten()
        values = book[codes]
        del codes
        first, last = cover(low, high, self.block)
        maxima = self._maxima(read, first, last)
        # whole blocks in place, and what is left of blocks at the ends
        begin, end = min(-low % self.block, len(values)), len(values)
        if begin:
            values[:begin] *= maxima[0]
        inner = (end - begin) // self.block
        skipped = 1 if begin else 0
        whole = values[begin : begin + inner * self.block].view(inner, self.block)
        whole *= maxima[skipped : skipped + inner, None]
        if begin + inner * self.block < end:
            values[begin + inner * self.block :] *= maxima[-1]
        return values.view(stop - start, width).to(self.dtype)

    def _codes(self, read: Read, first: int, last: int) -> Tensor:
        """Code of every element of bytes ``first:last``; the first of a byte is in its high half."""
        start, stop = cover(first, last, self.storage)
        packed = read(self.tensors[0], slice(start, stop)).flatten().view(torch.uint8)
        packed = packed[first - start * self.storage :][: last - first]
        return torch.stack((packed >> 4, packed & 15), dim=1).flatten()

    def _maxima(self, read: Read, first: int, last: int) -> Tensor:
        stored = read(self.tensors[1], slice(first, last))
        if self.nested_block is None or self.offset is None:
            return stored.to(torch.float32)
        of_blocks = read(self.tensors[3], slice(*cover(first, last, self.nested_block)))
        book = read(self.tensors[4]).flatten()
        return book[stored.to(torch.int32)] * spread(of_blocks, first, last, self.nested_block, 0) + self.offset


@dataclass(frozen=True, kw_only=True)
class RowScaledInt8(EncodedMatrix):
    """INT8 codes times the 127th part of their row's maximum in fp32, rounded to `dtype`."""

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        codes = read(self.tensors[0], slice(start, stop), ALL)
        maxima = read(self.tensors[1], slice(start, stop))
        return from_int8(codes, maxima.view(-1, 1)).to(self.dtype)


def find(reader: CheckpointReader, settings: Record, dtype: torch.dtype) -> Found:
    """``quant_method: bitsandbytes``: layers of 4 and of 8 bits, told apart by their tensors."""
    four, kinds, nested = {}, set(), False
    unused = {name for name in reader if name.endswith(".weight_format")}
    for kind, suffix in _STATES.items():
        for weight in layers_with(reader, suffix):
            four[weight] = matrix = _four_bit(Parts(reader, weight, f"bitsandbytes {kind.upper()}"), suffix)
            unused.add(weight + suffix)
            kinds.add(kind.upper())
            nested |= matrix.nested_block is not None
    eight = {
        f"{layer}.weight": _eight_bit(Parts(reader, layer, "bitsandbytes INT8"), dtype)
        for layer in layers_with(reader, ".SCB")
    }
    names = [*sorted(kinds), *(["INT8"] if eight else [])]
    name = f"bitsandbytes {' and '.join(names)}{' with nested block maxima' if nested else ''}"
    return Found(format=name, matrices={**four, **eight}, unused=unused)


def _four_bit(parts: Parts, suffix: str) -> FourBitMatrix:
    info = parts.info(suffix, ["U8"])
    where = f"{parts.reader.directory}: {parts.name(suffix)}"
    if info.nbytes > _MAX_STATE:
        raise CheckpointError(f"{where}: {info.nbytes} bytes are no settings; fetch the model again")
    state = Record(read_quant_state(parts.reader.part(parts.name(suffix)), where), where)
    rows, columns = state["shape"]
    block = state["blocksize"]
    dtype = NAMED_DTYPES[state.expect("dtype", lambda v: v in NAMED_DTYPES, f"one of {', '.join(NAMED_DTYPES)}")]
    blocks = -(-rows * columns // block)
    storage = DTYPES[parts.info("", _STORAGES).dtype].itemsize
    size = -(-rows * columns // 2 // storage)
    parts.expect("", _STORAGES, (size, 1), (size,))
    parts.expect(".quant_map", ["F32"], (_SMALL_BOOK,))
    tensors = [parts.name(name) for name in ("", ".absmax", ".quant_map")]
    nested_block = offset = None
    if ".nested_absmax" in parts:
        nested_block = state.integer("nested_blocksize", low=1)
        offset = float(state["nested_offset"])
        parts.expect(".absmax", ["U8"], (blocks,))
        parts.expect(".nested_absmax", ["F32"], (-(-blocks // nested_block),))
        parts.expect(".nested_quant_map", ["F32"], (_BOOK,))
        tensors += [parts.name(name) for name in (".nested_absmax", ".nested_quant_map")]
    else:
        parts.expect(".absmax", ["F32"], (blocks,))
    return FourBitMatrix(
        shape=(rows, columns),
        dtype=dtype,
        tensors=tuple(tensors),
        block=block,
        storage=storage,
        nested_block=nested_block,
        offset=offset,
    )


def _eight_bit(parts: Parts, dtype: torch.dtype) -> RowScaledInt8:
    info = parts.info(".weight", ["I8"])
    if len(info.shape) != 2 or 0 in info.shape:
        raise parts.wrong(".weight", "a matrix")
    parts.expect(".SCB", ["F32"], (info.shape[0],))
    if ".weight_format" in parts:
        parts.scalar(".weight_format", ["U8"])
        layout = int(parts.reader.part(parts.name(".weight_format")).item())
        if layout != 0:  # tiles for one generation of GPUs, which bitsandbytes no longer writes
            raise parts.wrong(".weight_format", f"0 (by rows), and it is {layout}")
    return RowScaledInt8(shape=info.shape, dtype=dtype, tensors=(parts.name(".weight"), parts.name(".SCB")))
