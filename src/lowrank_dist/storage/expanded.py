"""Weights of a model in which layers stand more than once, read from those of the model without the copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo


class ExpandedReader(CheckpointReader):
    """A `CheckpointReader` that shows weights under other names, some of them more than once and some as zeros.

    Nothing is copied. A tensor of zeros has the shape, dtype and size of the one that it stands for, and is not read.

    Parameters
    ----------
    inner
        Reader of the stored weights; closed with this one.
    names
        For every name here, the name in `inner`, and whether its values are zeros.
    identity
        What distinguishes these weights from those of `inner`; enters the fingerprint.
    """

    def __init__(self, inner: CheckpointReader, names: dict[str, tuple[str, bool]], identity: str) -> None:
        # the parent's __init__ looks for files
        self.inner, self.directory, self.encoding = inner, inner.directory, inner.encoding
        self.identity = inner.identity + identity.encode()
        self.bytes_read = 0
        self._names = names
        self._file_of = dict.fromkeys(names, "")
        self._files, self._joined = {}, {}
        self._info = {name: inner.stored(stored) for name, (stored, _) in names.items()}

    @property
    def files(self) -> list[Path]:
        return self.inner.files

    @property
    def returns_values(self) -> bool:
        return self.inner.returns_values

    def decodes(self, name: str) -> bool:
        return any(self.inner.decodes(self._names[piece.key][0]) for piece in self.pieces(name))

    def part(self, name: str, *index: int | slice) -> Tensor:
        stored, zero = self._names[name]
        part = self.inner.part(stored, *index)
        return torch.zeros_like(part) if zero else part

    def _load(self, name: str, start: int, stop: int, entry: int | None = None) -> Tensor:
        stored, zero = self._names[name]
        info = self._info[name]
        if zero:
            return torch.zeros(stop - start, *info.shape[1 if entry is None else 2 :], dtype=self._dtype(info))
        return self._counted(lambda: self.inner._load(stored, start, stop, entry))

    def _counted(self, read: Callable[[], Tensor]) -> Tensor:
        """What `read` returns; the bytes that `inner` counts meanwhile, those of encoded tensors, are counted here."""
        before = self.inner.bytes_read
        values = read()
        self.bytes_read += self.inner.bytes_read - before
        return values

    @staticmethod
    def _dtype(info: TensorInfo) -> torch.dtype:
        return DTYPES.get(info.dtype, torch.float32)

    def _count(self, name: str, values: Tensor) -> None:
        stored, zero = self._names[name]
        if not zero and not self.inner.decodes(stored):
            super()._count(name, values)

    def _open(self, file: str) -> Any:
        return self.inner._open(file)

    def close(self) -> None:
        self.inner.close()
