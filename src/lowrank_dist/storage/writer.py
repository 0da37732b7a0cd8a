"""Writing: safetensors files that several processes fill together, and JSON.

The shapes and dtypes of all tensors are known beforehand, and so are their offsets in the files. One process writes the
headers and extends the files to their length. Then every process writes its bytes at their offsets, so that no process
holds or receives a whole tensor. All processes must see the directory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowrank_dist.errors import CheckpointError, naming
from lowrank_dist.storage.atomic import atomic_file
from lowrank_dist.storage.dtypes import CODES, DTYPES
from lowrank_dist.storage.reader import FileTensor, TensorInfo

MAX_BYTES = 5_000_000_000  # limit of one file, that of transformers


def stored_dtype(name: str, info: TensorInfo) -> torch.dtype:
    """Dtype of a stored tensor that is to be written again.

    Raises
    ------
    CheckpointError
        If the dtype cannot be written.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{name}: stored as {info.dtype}; only {', '.join(DTYPES)} can be copied")
    return DTYPES[info.dtype]


@dataclass(frozen=True, kw_only=True)
class _Place:
    file: str
    offset: int
    tensor: FileTensor


class TensorFiles:
    """Safetensors files under construction.

    Parameters
    ----------
    directory
        Directory of the files.
    tensors
        All tensors by name. The same on every process.
    stem
        First part of the names: ``<stem>.safetensors``, or ``<stem>-00001-of-0000N.safetensors`` and an index if one
        file would exceed `max_bytes`.
    max_bytes
        Limit of one file; a larger tensor has a file of its own.

    Raises
    ------
    ValueError
        If a tensor has an unsupported dtype.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, FileTensor], *, stem: str = "model", max_bytes: int = MAX_BYTES
    ) -> None:
        self.directory = directory
        self._places: dict[str, _Place] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        groups = _groups(tensors, max_bytes)
        for number, names in enumerate(groups, start=1):
            many = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(f"{stem}.safetensors" if len(groups) == 1 else many, names, tensors)
        self._index = f"{stem}.safetensors.index.json" if len(groups) > 1 else None

    def _lay_out(self, file: str, names: list[str], tensors: Mapping[str, FileTensor]) -> None:
        # readers map the file and view its bytes as numbers: wide types first, so that all are aligned
        names = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor = tensors[name]
            if tensor.dtype not in CODES:
                raise ValueError(f"{name}: {tensor.dtype} cannot be written; only {', '.join(map(str, CODES))} can")
            start, end = end, end + tensor.numel * tensor.dtype.itemsize
            header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        first = len(self._headers[file])
        self._sizes[file] = first + end
        for name in names:
            self._places[name] = _Place(file=file, offset=first + header[name]["data_offsets"][0], tensor=tensors[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def create(self) -> None:
        """Write headers and index, and extend every file with zeros. One process only, before any writes."""
        for file, header in self._headers.items():
            with naming(self.directory / file), open(self.directory / file, "wb") as handle:
                handle.write(header)
                handle.truncate(self._sizes[file])
        if self._index is not None:
            tensors = [place.tensor for place in self._places.values()]
            total = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors)
            weight_map = {name: place.file for name, place in sorted(self._places.items())}
            write_json(self.directory / self._index, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def exist(self) -> bool:
        """Whether `create` was called on this directory for the same tensors."""
        for file, header in self._headers.items():
            path = self.directory / file
            if not path.is_file() or path.stat().st_size != self._sizes[file]:
                return False
            with open(path, "rb") as handle:
                if handle.read(len(header)) != header:
                    return False
        return True

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write the flat `values` from element `start` of tensor `name` on."""
        place = self._places[name]
        if values.dtype != place.tensor.dtype or not 0 <= start <= start + values.numel() <= place.tensor.numel:
            raise ValueError(
                f"{name} {list(place.tensor.shape)} {place.tensor.dtype}: {values.numel()} elements of {values.dtype} "
                f"from element {start} on do not fit"
            )
        if values.numel() == 0:
            return
        if place.file not in self._open:
            self._open[place.file] = os.open(self.directory / place.file, os.O_WRONLY)
        flat: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy()
        data = memoryview(flat)
        offset = place.offset + start * values.dtype.itemsize
        with naming(self.directory / place.file):
            while data:
                written = os.pwrite(self._open[place.file], data, offset)
                data, offset = data[written:], offset + written

    def flush(self) -> None:
        """Flush to disk what this process has written."""
        for file, descriptor in self._open.items():
            with naming(self.directory / file):
                os.fdatasync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _groups(tensors: Mapping[str, FileTensor], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of every file, in the given order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel * tensor.dtype.itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def write_report(path: Path, value: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Write JSON to a file that a user has chosen; complete or absent (`lowrank_dist.storage.atomic.atomic_file`)."""
    with atomic_file(path, overwrite=overwrite) as fresh:
        write_json(fresh, value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    with naming(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous CPU copies of `tensors` as one safetensors file (``format: pt``)."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # that of any new file; safetensors makes it 0600
    try:
        save_file(copies, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
