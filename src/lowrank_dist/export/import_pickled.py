"""Weights in files of ``torch.save`` written as safetensors, file by file; nothing in them is executed.

An adapter in ``adapter_model.bin``, as older releases of PEFT wrote it, becomes ``adapter_model.safetensors`` with its
configuration.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_dist.errors import CheckpointError, InputError, is_passing
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.dtypes import CODES
from lowrank_dist.storage.find_weights import PICKLED
from lowrank_dist.storage.layout import CONFIG
from lowrank_dist.storage.parse import is_object_of, is_text, open_regular, printable, read_record, refuse_pointer
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.replacing import check_parent, check_target
from lowrank_dist.storage.small_files import copy_small_files, small_files
from lowrank_dist.storage.writer import MAX_BYTES, TensorFiles

log = logging.getLogger(__name__)

INDEX = "pytorch_model.bin.index.json"
_ADAPTER = "adapter_model"
#: Entries under which training programs keep the weights.
_INSIDE = ("state_dict", "model_state_dict", "model")
#: Files of a training run that hold no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt")


def import_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_BYTES,
    show_progress: bool = False,
) -> Path:
    """Write the weights of a directory with ``pytorch_model.bin``, of an adapter, or of one file as safetensors.

    Files are read with ``torch.load(weights_only=True)``, memory-mapped, one at a time: host memory holds a tensor.
    Configuration, tokenizer and licence are copied. Tensors that share memory are written each by itself.

    Parameters
    ----------
    source
        Directory with ``pytorch_model.bin``, with its index and the files it names, with ``adapter_model.bin`` and
        ``adapter_config.json``, or with one other file of weights; or such a file.
    output
        Directory to write: complete or absent.
    max_file_bytes
        Limit of one file.
    show_progress
        Show a progress bar on standard error.

    Returns
    -------
    Path
        `output`, as an absolute path.

    Raises
    ------
    InputError
        If `output` exists and is not empty, or there are several files and no index.
    CheckpointError
        If a file is missing, is damaged, or holds something else than tensors, if the index names a tensor that no file
        holds, or if an adapter has no configuration.

    See Also
    --------
    lowrank_dist.storage.CheckpointReader : Reads what was written.

    Examples
    --------
    >>> import pathlib, tempfile, torch
    >>> from lowrank_dist.export.import_pickled import import_checkpoint
    >>> from lowrank_dist.storage import CheckpointReader
    >>> directory = pathlib.Path(tempfile.mkdtemp())
    >>> torch.save({"layer.weight": torch.ones(4, 3)}, directory / "pytorch_model.bin")
    >>> reader = CheckpointReader(import_checkpoint(directory, directory / "imported"))
    >>> reader.info("layer.weight").shape
    (4, 3)
    >>> reader.close()
    """
    source, target = Path(source), Path(output).absolute()
    check_target(target, overwrite=False, inputs=[source])
    check_parent(target)
    found = _found(source)
    files, beside = found.files, small_files(source, found.files)
    if found.stem == _ADAPTER:
        beside[CONFIG] = _configuration(files[0])
    tensors: dict[str, FileTensor] = {}
    of_file: dict[str, Path] = {}
    for file in files:
        for name, tensor in _tensors(file, announce=True):
            if name in tensors:
                raise CheckpointError(f"{file}: holds {printable(name)}, which {of_file[name].name} holds too")
            tensors[name], of_file[name] = FileTensor(shape=tuple(tensor.shape), dtype=tensor.dtype), file
    lacking = sorted(found.indexed - tensors.keys())
    if lacking:
        raise CheckpointError(
            f"{source / INDEX}: names {printable(lacking[0])}, which no file holds ({len(lacking)} such tensors); "
            "fetch the model again"
        )
    with atomic_directory(target, overwrite=False) as staging:
        # PEFT reads one file
        limit = sys.maxsize if found.stem == _ADAPTER else max_file_bytes
        written = TensorFiles(staging, tensors, stem=found.stem, max_bytes=limit)
        written.create()
        try:
            for file in tqdm(files, desc="Importing", unit="file", disable=not show_progress):
                for name, tensor in _tensors(file):
                    written.write(name, 0, tensor.contiguous().flatten())
        finally:
            written.close()
        copy_small_files(beside, staging)
    return target


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The files to read, the tensors that their index names, and the stem of what is written."""

    files: list[Path]
    indexed: frozenset[str] = frozenset()
    stem: str = "model"


def _found(source: Path) -> _Found:
    """What of `source` is read: the single file before an index beside it, as of safetensors."""
    if source.is_file():
        return _Found(files=[source], stem=_ADAPTER if source.name == f"{_ADAPTER}.bin" else "model")
    single, index = source / "pytorch_model.bin", source / INDEX
    if single.is_file():
        if index.is_file():
            log.warning("%s is read, and %s beside it is not; remove one of them", single, index.name)
        return _Found(files=[single])
    if index.is_file():

        def is_beside(file: Any) -> bool:
            return is_text(file) and file == os.path.basename(file)

        names = read_record(index).expect("weight_map", is_object_of(is_beside), "files beside it by tensor")
        return _Found(files=[source / name for name in sorted(set(names.values()))], indexed=frozenset(names))
    if (source / f"{_ADAPTER}.bin").is_file():
        return _Found(files=[source / f"{_ADAPTER}.bin"], stem=_ADAPTER)
    found = sorted(f for pattern in PICKLED for f in source.glob(pattern) if f.name not in _NO_WEIGHTS)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise InputError(
            f"{source}: neither {INDEX} nor pytorch_model.bin, and {len(found)} other files of weights ({names}); pass "
            "the file itself"
        )
    return _Found(files=found)


def _configuration(adapter: Path) -> Path:
    """The configuration beside an adapter's file."""
    path = adapter.with_name(CONFIG)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, without which nothing loads {adapter.name}; put it beside the file")
    return path


def _tensors(file: Path, *, announce: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, memory-mapped. Announced is the entry that they lie under, if they do."""
    with open(open_regular(file), "rb") as handle:
        refuse_pointer(file, handle.read(64))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_archive(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        if is_passing(error):
            raise
        raise CheckpointError(
            f"{file}: torch.load(weights_only=True) does not read it ({printable(str(error), 300)}); files that hold "
            "more than tensors are not opened, since that would run their code"
        ) from error
    for entry in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            if announce:
                others = ", ".join(printable(name) for name in content if name != entry) or "nothing"
                log.warning("%s: the weights are those of its entry %r; not written: %s", file, entry, others)
            content = content[entry]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not is_text(name) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {printable(name)} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in CODES or tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}, {tensor.layout}, which is not written")
        yield name, tensor.detach()


def _is_archive(file: Path) -> bool:
    """Whether a file is one of torch 1.6 and later, which can be mapped."""
    with open(file, "rb") as handle:
        return handle.read(2) == b"PK"
