"""Checkpoints on disk: a streaming reader of sharded safetensors; writers whose output is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_dist.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_Request = TypeVar("_Request")
_Block = TypeVar("_Block")

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(InputError):
    """A checkpoint that cannot be read as it is; the message names the file, the tensor and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a checkpoint says of one tensor: its shape, its safetensors dtype (``BF16``, ...) and its size in bytes."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class CheckpointReader:
    """Reads slices of the tensors of a safetensors checkpoint and counts the bytes it hands out.

    Opens every file once and reads its header; tensor data is read only where asked for (memory-mapped).

    Parameters
    ----------
    directory
        Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.

    Raises
    ------
    CheckpointError
        Where no checkpoint is there, a file is missing or truncated, or the index names a tensor that its file
        does not hold.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._info: dict[str, TensorInfo] = {}
        index_path = self.directory / INDEX_NAME
        if index_path.is_file():
            try:
                self._file_of = dict(json.loads(index_path.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index_path}: not a safetensors index: {error!r}; fetch it again") from error
        elif (self.directory / SINGLE_NAME).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        else:
            raise CheckpointError(
                f"{self.directory}: holds neither {INDEX_NAME} nor {SINGLE_NAME}; pass a directory or a hub id with "
                "safetensors weights (convert others with `model.save_pretrained(directory)` of transformers)"
            )
        held = {file: set(self._open(file).keys()) for file in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{index_path}: names tensor {name}, which {file} does not hold; fetch both again"
                )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, though {INDEX_NAME} names it; fetch it again")
            try:
                self._files[file] = safe_open(path, framework="pt").__enter__()
            except SafetensorError as error:
                size = path.stat().st_size
                raise CheckpointError(
                    f"{path}: {size} bytes, truncated or corrupt ({error}); fetch it again"
                ) from error
        return self._files[file]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.info(name).nbytes for name in self._file_of)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and size of tensor `name`."""
        if name not in self._info:
            view = self._open(self._file_of[name]).get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            bits = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}.get(dtype) or int("".join(filter(str.isdigit, dtype)))
            numel = 1
            for size in shape:
                numel *= size
            self._info[name] = TensorInfo(shape=shape, dtype=dtype, nbytes=numel * bits // 8)
        return self._info[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension, in the dtype of the file."""
        if start >= stop:
            shape = (0, *self.info(name).shape[1:])
            return torch.empty(shape, dtype=FLOAT_DTYPES.get(self.info(name).dtype, torch.float32))
        rows: Tensor = self._open(self._file_of[name]).get_slice(name)[start:stop]
        self.bytes_read += rows.nbytes
        return rows

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of the flattened tensor, in the dtype of the file.

        Whole rows of the first dimension are read, so that the rows at both ends may be read by two ranks; only
        the elements asked for are counted as read.
        """
        shape = self.info(name).shape
        if not shape:
            whole: Tensor = self._open(self._file_of[name]).get_tensor(name).reshape(1)
            self.bytes_read += whole[start:stop].nbytes
            return whole[start:stop]
        width = max(1, self.info(name).nbytes and torch.Size(shape[1:]).numel())
        first, last = start // width, -(-stop // width)
        before = self.bytes_read
        part = self.rows(name, first, last).reshape(-1)[start - first * width : stop - first * width]
        self.bytes_read = before + part.nbytes
        return part

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()


def read_ahead(read: Callable[[_Request], _Block], requests: Iterable[_Request], *, depth: int = 1) -> Iterator[_Block]:
    """``map(read, requests)`` with a thread that stays `depth` results ahead of the consumer.

    Host memory holds at most ``depth + 1`` results beside the one in use. An error of `read` is raised where its
    result would have been.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending: deque[Future[_Block]] = deque()
        try:
            for request in requests:
                pending.append(pool.submit(read, request))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def resolve_checkpoint(pretrained: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Local directory of a checkpoint: `pretrained` itself, or the hub's cache after fetching what is missing.

    On several ranks of a host call it on one rank first: the others then find the cache complete.

    Raises
    ------
    CheckpointError
        Where it is no directory and cannot be fetched.
    """
    path = Path(pretrained)
    if path.is_dir():
        return path
    looks_local = path.is_absolute() or str(pretrained).startswith((".", "~")) or str(pretrained).count("/") > 1
    if looks_local:
        raise CheckpointError(f"pretrained={str(pretrained)!r}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(pretrained), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"pretrained={str(pretrained)!r}: neither a directory nor a model the hub or its cache could give "
            f"({type(error).__name__}: {error}); pass a local directory, or fetch it first with `hf download`"
        ) from error


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to fill, beside `target`; flushed to disk and renamed to it at the end, removed on any error.

    An existing `target` is replaced. A reader sees the old one, none for an instant, or the new one: never a part.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            _fsync(path)
        _fsync(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staging.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Contiguous CPU copies of `tensors` as one safetensors file (``format: pt``)."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", **(metadata or {})},
    )
