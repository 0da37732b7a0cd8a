"""GGUF: files of llama.cpp, decoded by the ``gguf`` package by rows, under the names that transformers gives them.

A row of a matrix is whole blocks of the file, so that rows are read and decoded alone. Where llama.cpp stores the rows
of a matrix in another order (queries and keys of LLaMA), transformers' own code says which; each row is read once.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.decoding.encoded import EncodedMatrix, Found, Read, refuse
from lowrank_dist.decoding.reader import DecodingReader
from lowrank_dist.errors import CheckpointError, ModelError, is_passing
from lowrank_dist.model.skeleton import build_skeleton, read_config
from lowrank_dist.storage.parse import open_regular, printable
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo

log = logging.getLogger(__name__)

_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
#: How transformers changes tensors of an architecture: not at all, by the order of rows, or by a vector minus one.
_PROCESSORS = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")
#: Tensors that transformers does not load either.
_FACTORS = "rope_freqs.weight"


class GGUFReader(CheckpointReader):
    """Reads the bytes of the tensors of a GGUF file, under their names in it.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        If it is damaged, or only a part of a model.
    """

    def __init__(self, path: Path) -> None:
        # the parent's __init__ looks for safetensors files
        if _PART.fullmatch(path.name):
            raise CheckpointError(
                f"{path}: is one of several parts; join them with `llama-gguf-split --merge`, or pass another file"
            )
        self.path = self.directory = path
        self.bytes_read = 0
        self._file = opened(path)
        self.tensors = {str(tensor.name): tensor for tensor in self._file.tensors}
        self._file_of = dict.fromkeys(self.tensors, path.name)
        self._joined, self._files = {}, {}
        self._info = {}
        for name, tensor in self.tensors.items():
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self._info[name] = TensorInfo(shape=shape, dtype=tensor.tensor_type.name, nbytes=int(tensor.n_bytes))
        described = repr([(name, info, int(self.tensors[name].data_offset)) for name, info in self._info.items()])
        self.identity = hashlib.sha256(described.encode()).digest()

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @property
    def architecture(self) -> str:
        """The architecture that the file names."""
        field = self._file.fields.get("general.architecture")
        return "" if field is None else bytes(field.parts[field.data[0]]).decode(errors="replace")

    def values(self, name: str, rows: slice | np.ndarray[Any, Any]) -> Any:
        """The stored bytes, or values, of rows of a tensor."""
        return np.ascontiguousarray(self.tensors[name].data[rows])

    def part(self, name: str, *index: int | slice) -> Tensor:
        (rows,) = index
        assert isinstance(rows, slice)
        return torch.from_numpy(self.values(name, rows).view(np.uint8))

    def close(self) -> None:
        self.tensors.clear()
        del self._file


@dataclass(frozen=True, kw_only=True)
class GGUFRows(EncodedMatrix):
    """Rows of a tensor of a file, decoded to fp32 by the ``gguf`` package.

    Attributes
    ----------
    file
        The file.
    order
        Where in the tensor every row stands; None: in order.
    change
        What transformers does with the values of a vector.
    """

    file: GGUFReader
    order: np.ndarray[Any, Any] | None = None
    change: Callable[[Any], Any] | None = None

    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        import gguf

        (name,) = self.tensors
        rows: Any = slice(start, stop) if self.order is None else self.order[start:stop]
        stored = self.file.values(name, rows)
        self.file.bytes_read += stored.nbytes
        values = gguf.dequantize(stored, self.file.tensors[name].tensor_type)
        if self.change is not None:
            values = self.change(values)
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(stop - start, *self.shape[1:])


class GGUFDecodingReader(DecodingReader):
    """A `DecodingReader` of a GGUF file."""

    stored_reader: GGUFReader

    def __init__(self, stored: GGUFReader, found: Found) -> None:
        super().__init__(stored, found)
        self.identity = stored.identity

    def _load(self, name: str, start: int, stop: int, entry: int | None = None) -> Tensor:
        before = self.stored_reader.bytes_read
        loaded = super()._load(name, start, stop, entry)
        self.bytes_read += self.stored_reader.bytes_read - before
        return loaded


def opened(path: Path) -> Any:
    """Open a GGUF file; its tensors are memory-mapped."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{path}: GGUF files are decoded by the package gguf; install it (`pip install gguf`)"
        ) from error
    with open(open_regular(path), "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: begins with {magic!r}, not with GGUF; fetch it again")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever the parser raises for bytes that it does not understand
        if is_passing(error):
            raise
        raise CheckpointError(f"{path}: truncated or corrupt ({printable(repr(error))}); fetch it again") from error


def open_gguf(path: Path) -> CheckpointReader:
    """Open a reader of a GGUF file that returns the weights decoded, by the names of transformers.

    Raises
    ------
    ModelError
        If transformers does not know the architecture, or changes its tensors by more than the order of rows.
    """
    stored = GGUFReader(path)
    try:
        return GGUFDecodingReader(stored, _find(stored))
    except Exception:
        stored.close()
        raise


def _find(stored: GGUFReader) -> Found:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor_class = TENSOR_PROCESSORS.get(stored.architecture, TensorProcessor)
    if processor_class.__name__ not in _PROCESSORS:
        raise refuse(
            stored.path,
            f"architecture {printable(stored.architecture)!r}, whose tensors transformers rearranges while loading",
            "pass the model that it was converted from, or load it with transformers (`gguf_file=`) and save it",
        )
    config = read_config(stored.path)
    backbone = build_skeleton(stored.path, config)
    try:
        names = get_gguf_hf_weights_map(backbone, processor_class(config=config.to_dict()))
    except NotImplementedError as error:
        raise ModelError(f"{stored.path}: {error}; pass the model that it was converted from") from error
    processor = processor_class(config=config.to_dict())
    matrices: dict[str, EncodedMatrix] = {}
    for name in stored:
        if name not in names:
            continue
        info = stored.stored(name)
        if len(info.shape) > 2:
            raise refuse(stored.path, f"{name} {list(info.shape)}, a stack")
        order = change = None
        if len(info.shape) == 2:
            rows = np.arange(info.shape[0])
            moved = processor.process(weights=rows[:, None], name=name).weights[:, 0]
            order = None if np.array_equal(moved, rows) else moved
        elif processor.process(weights=np.ones(1), name=name).weights[0] != 1:

            def change(values: Any, name: str = name) -> Any:
                return processor.process(weights=values, name=name).weights

        matrices[names[name]] = GGUFRows(
            shape=info.shape, dtype=torch.float32, tensors=(name,), file=stored, order=order, change=change
        )
    unused = {name for name in stored if name not in names}
    if unused and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        hint = ""
        if _FACTORS in unused:
            hint = (
                "; without a scaling of rotary positions in config.json beside the file, transformers applies none "
                "either: put the original model's config.json there"
            )
        log.warning("%s: %s are not read, as transformers does%s", stored.path, ", ".join(sorted(unused)), hint)
    kinds = sorted({stored.stored(name).dtype for name in stored if len(stored.stored(name).shape) == 2})
    return Found(format=f"GGUF {', '.join(kinds)}", matrices=matrices, unused=unused)
