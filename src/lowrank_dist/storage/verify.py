"""Digests of files, compared with a manifest: those of checkpoints (SHA-256) and those of residual models (sums).

A digest of a tensor covers its dtype and shape. A whole tensor of a checkpoint is written by one rank, which hashes it;
a tensor of a residual model is written by all ranks in pieces, whose sums add up (`lowrank_dist.storage.digest`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, is_passing
from lowrank_dist.storage.digest import digest_of_pieces, piece_sums
from lowrank_dist.storage.layout import (
    ADAPTER_DIR,
    CONFIG,
    ENCODED_DIR,
    INITIAL_DIR,
    LORA_DIR,
    MANIFEST,
    PARTS,
    RESIDUAL_STEM,
    STATE,
    WEIGHTS,
    read_manifest,
    seal_of,
)
from lowrank_dist.storage.parse import MAX_MANIFEST, Record, read_bytes
from lowrank_dist.storage.reader import CheckpointReader

FORMAT = 3  # of checkpoints; hashes of format 2 cover neither dtype nor shape
#: The parts that hold an adapter.
ADAPTER_PARTS = (ADAPTER_DIR, INITIAL_DIR, ENCODED_DIR, LORA_DIR, "root")

FROZEN_STEM, ENCODED_STEM = "frozen_factors", "encoded_factors"
INITIAL = Path(WEIGHTS).stem
PIECE = 2**24  # elements of a tensor that are read at once


def tensor_digest(tensor: Tensor, version: int = FORMAT) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and bytes; before `version` 3, of its bytes alone."""
    data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode() if version >= 3 else b"")
    digest.update(memoryview(data))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a small regular file."""
    return hashlib.sha256(read_bytes(path, MAX_MANIFEST)).hexdigest()


# -- checkpoints ------------------------------------------------------------------------------------------------------


class HashedParts:
    """The parts of a checkpoint, and their comparison with the hashes in its manifest.

    Parameters
    ----------
    directory, manifest
        The checkpoint.
    """

    def __init__(self, directory: Path, manifest: Record) -> None:
        self.directory, self.manifest = directory, manifest
        self._readers: dict[str, CheckpointReader] = {}

    def part(self, name: str) -> CheckpointReader:
        """The tensors of one of `PARTS`."""
        if name not in self._readers:
            directory, stem = PARTS[name]
            self._readers[name] = CheckpointReader(self.directory / directory, stem=stem)
        return self._readers[name]

    def verify(self, group: ShardGroup, parts: Collection[str] = tuple(PARTS)) -> None:
        """Read `parts` and the small files once, each rank its share, and compare their hashes. Collective.

        Raises
        ------
        CheckpointError
            On every rank if a hash differs. The message names the file and the tensor.
        """
        with group.shared_errors():
            work = [*self._files(parts), *self._tensors(parts)]
            for what, part, name, expected in work[group.rank :: group.size]:
                if self._digest(part, name) != expected:
                    raise CheckpointError(
                        f"{self.directory}: {what} is damaged: its SHA-256 is not the one in {MANIFEST}; use another "
                        "checkpoint"
                    )

    def _files(self, parts: Collection[str]) -> Iterator[tuple[str, str | None, str, str]]:
        for name, digest in sorted(self.manifest.get("files", {}).items()):
            first = name.partition("/")[0]
            if first in parts or (first not in PARTS and STATE in parts):
                yield name, None, name, digest

    def _tensors(self, parts: Collection[str]) -> Iterator[tuple[str, str | None, str, str]]:
        for part, hashes in sorted(self.manifest["hashes"].items()):
            if part not in PARTS:
                raise CheckpointError(f"{self.directory / MANIFEST}: has hashes of an unknown part; it is damaged")
            if part in parts:
                for name in sorted(hashes.keys() | set(self.part(part))):
                    file = f"{'/'.join(filter(None, PARTS[part]))}.safetensors"
                    yield f"{name} in {file}", part, name, hashes.get(name, "")

    def _digest(self, part: str | None, name: str) -> str | None:
        if part is None:
            path = self.directory / name
            return file_digest(path) if path.exists() else None
        reader = self.part(part)
        if name not in reader:
            return None
        shape = torch.Size(reader.stored(name).shape)
        return tensor_digest(reader.flat(name, 0, shape.numel()).view(shape), self.manifest.get("format", FORMAT))

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def verify_checkpoint(directory: Path, group: ShardGroup, parts: Collection[str] = ADAPTER_PARTS) -> None:
    """Compare `parts` of a checkpoint with the hashes in its manifest. Collective.

    Nothing is compared with a manifest that has none, such as that of a converted LoRA.

    Raises
    ------
    CheckpointError
        On every rank if a hash differs, or the manifest is not what was written.
    """
    with group.shared_errors():
        manifest = read_manifest(directory)
        check_seal(directory, manifest)
    if "hashes" in manifest:
        checkpoint = HashedParts(directory, manifest)
        try:
            checkpoint.verify(group, parts)
        finally:
            checkpoint.close()


def verify_adapter(directory: Path, group: ShardGroup) -> None:
    """Compare an adapter with the manifest in its directory, or in the checkpoint that it is a part of. Collective.

    An adapter that others wrote has nothing to compare.

    Raises
    ------
    CheckpointError
        On every rank if a hash differs.
    """
    directory = directory.absolute()
    if (directory / MANIFEST).exists():
        verify_checkpoint(directory, group)
    elif directory.name in PARTS and (directory.parent / MANIFEST).exists():
        verify_checkpoint(directory.parent, group, [directory.name])


def hashes_of_root(directory: Path) -> dict[str, dict[str, str]]:
    """The entry ``hashes`` of the manifest of a converted LoRA in `directory`."""
    lora = HashedParts(directory, Record({}, str(directory)))
    try:
        reader = lora.part("root")
        return {"root": {name: str(lora._digest("root", name)) for name in reader}}
    finally:
        lora.close()


def check_seal(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a manifest that has a seal, or should have one, is not what was written."""
    should = manifest.get("kind") == "checkpoint" or "hashes" in manifest or "tensors" in manifest
    if (should or "seal" in manifest) and manifest.get("seal") != seal_of(manifest):
        raise CheckpointError(f"{directory / MANIFEST}: damaged: it differs from what was written")


# -- residual models --------------------------------------------------------------------------------------------------


def label(name: str, code: str, shape: tuple[int, ...]) -> str:
    """Name, dtype and shape of a tensor, all of which its digest covers."""
    return f"{name} {code} {list(shape)}"


def damage(directory: Path, group: ShardGroup) -> str | None:
    """What differs between the residual model in `directory` and its manifest, or None. Collective.

    Every rank reads its share of the tensors. One object all-gather, and the collectives of `ShardGroup.shared_errors`:
    an OSError that may pass is raised on every rank. Nothing is compared if there is no manifest, as in
    residual models that others publish, or one without digests, as earlier versions wrote it.
    """
    found = None
    with group.shared_errors():
        try:
            manifest = read_manifest(directory) if (directory / MANIFEST).exists() else {}
            check_seal(directory, manifest)
            if "tensors" in manifest:
                compare(directory, manifest, group)
        except (CheckpointError, OSError) as error:
            if is_passing(error):
                raise
            found = str(error)
    return next(filter(None, group.gather_objects(found)), None)


def compare(directory: Path, manifest: Mapping[str, Any], group: ShardGroup) -> None:
    """Raise CheckpointError if this rank's share of the files differs from `manifest`. Nothing is communicated."""
    initial = _initial(directory)
    if group.rank == 0 and file_digest(initial / CONFIG) != manifest.get("adapter_config"):
        raise CheckpointError(f"{initial / CONFIG}: differs from what was written")
    for stem, digests in manifest["tensors"].items():
        beside = stem in (INITIAL, FROZEN_STEM, ENCODED_STEM)
        if not beside and stem not in ("model", RESIDUAL_STEM):
            raise CheckpointError(f"{directory / MANIFEST}: has digests of an unknown file; it is damaged")
        reader = CheckpointReader(initial if beside else directory, stem=stem)
        try:
            names = sorted(digests.keys() | set(reader))
            for name in names[group.rank :: group.size]:
                if name not in reader or name not in digests or _digest(reader, name) != digests[name]:
                    raise CheckpointError(f"{reader.directory}: {name} in {stem}.* differs from what was written")
        finally:
            reader.close()


def _initial(directory: Path) -> Path:
    found = sorted(path.parent for path in directory.glob(f"*_init/{CONFIG}"))
    if len(found) != 1:
        raise CheckpointError(f"{directory}: holds {len(found)} initial adapters instead of one")
    return found[0]


def _digest(reader: CheckpointReader, name: str) -> str:
    info, sums = reader.stored(name), [0, 0]
    what, numel = label(name, info.dtype, info.shape), math.prod(info.shape)
    for start in range(0, numel, PIECE):
        part = piece_sums(what, reader.flat(name, start, min(start + PIECE, numel)), start)
        sums = [a + b for a, b in zip(sums, part, strict=True)]
    return digest_of_pieces(what, sums, info.nbytes)
