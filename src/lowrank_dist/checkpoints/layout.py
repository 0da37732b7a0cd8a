"""A checkpoint of a training run on disk: its parts, its manifest and its verification.

::

    step=100/
        adapter/                    trained A and B: a PEFT adapter for the residual
        adapter_init/               A_0 and B_0 in the same format
        adapter_encoded/            A_e and B_e: the residual encodes W - s B_e A_e (only if other than A_0, B_0 or 0)
        lora/                       converted: a PEFT adapter for the original model
        optimizer.safetensors       <parameter>.exp_avg, ...: moments in full shape, fp32; <parameter>.fp32: masters
        state.json, state.safetensors   loops, callbacks, schedules, position in the data, random number generators
        lowrank_dist.json           manifest, written last: settings, step, fingerprints, a SHA-256 of everything

Everything is safetensors or JSON: reading it runs no code. The frozen residual is not stored; it is rebuilt from the
pretrained weights and compared with the digests in the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dist.checkpoints.codec import decode_state
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import ADAPTER_DIR, ENCODED_DIR, INITIAL_DIR, LORA_DIR, MANIFEST, WEIGHTS
from lowrank_dist.storage.reader import CheckpointReader

FORMAT = 2
OPTIMIZER = "optimizer"
STATE = "state"

#: Directory inside the checkpoint, and stem of the file names, of every part that consists of tensors.
PARTS = {
    ADAPTER_DIR: (ADAPTER_DIR, Path(WEIGHTS).stem),
    INITIAL_DIR: (INITIAL_DIR, Path(WEIGHTS).stem),
    ENCODED_DIR: (ENCODED_DIR, Path(WEIGHTS).stem),
    LORA_DIR: (LORA_DIR, Path(WEIGHTS).stem),
    OPTIMIZER: ("", OPTIMIZER),
    STATE: ("", STATE),
}


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a SHA-256 of itself under ``seal``."""
    return {**manifest, "seal": _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class TrainingCheckpoint:
    """A checkpoint to resume from.

    Parameters
    ----------
    directory
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` or ``trainer.save_checkpoint`` wrote.

    Attributes
    ----------
    manifest : dict
        Settings, step, fingerprints and hashes.

    Raises
    ------
    CheckpointError
        If the directory is not a checkpoint of this format, or its manifest is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"ckpt_path={str(directory)!r}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint or "
                "trainer.save_checkpoint wrote under PiSSAStrategy"
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged ({error}); resume from another checkpoint") from error
        if self.manifest.get("kind") != "checkpoint" or self.manifest.get("format") != FORMAT:
            found = f"format {self.manifest.get('format')!r} of kind {self.manifest.get('kind')!r}"
            raise CheckpointError(
                f"ckpt_path={str(directory)!r}: {found}, but resuming needs format {FORMAT} of kind 'checkpoint'; pass "
                "a checkpoint that this version wrote"
            )
        if self.manifest.get("seal") != _seal(self.manifest):
            raise CheckpointError(
                f"{path}: damaged: its content differs from what was written; resume from another checkpoint"
            )
        self._readers: dict[str, CheckpointReader] = {}

    @property
    def has_training_state(self) -> bool:
        """Whether training can resume from the checkpoint; False if it was saved with ``weights_only``."""
        return OPTIMIZER in self.manifest["hashes"]

    def part(self, name: str) -> CheckpointReader:
        """The tensors of one of `PARTS`."""
        if name not in self._readers:
            directory, stem = PARTS[name]
            self._readers[name] = CheckpointReader(self.directory / directory, stem=stem)
        return self._readers[name]

    def state(self) -> dict[str, Any]:
        """Lightning's checkpoint dictionary (loops, callbacks, schedules, ...). Decoding it runs no code."""
        tensors = load_file(self.directory / f"{STATE}.safetensors")
        state: dict[str, Any] = decode_state(json.loads((self.directory / f"{STATE}.json").read_text()), tensors)
        return state

    def verify(self, group: ShardGroup) -> None:
        """Read everything once, each rank its share, and compare it with the hashes. Collective.

        Raises
        ------
        CheckpointError
            On every rank if a hash differs. The message names the file and the tensor.
        """
        work = [*self._files(), *self._tensors()]
        with group.shared_errors():
            for what, part, name, expected in work[group.rank :: group.size]:
                if self._digest(part, name) != expected:
                    raise CheckpointError(
                        f"{self.directory}: {what} is damaged: its SHA-256 is not the one in {MANIFEST}; resume from "
                        "another checkpoint"
                    )

    def _files(self) -> Iterator[tuple[str, str | None, str, str]]:
        for name, digest in sorted(self.manifest["files"].items()):
            yield name, None, name, digest

    def _tensors(self) -> Iterator[tuple[str, str | None, str, str]]:
        for part, hashes in sorted(self.manifest["hashes"].items()):
            for name, digest in sorted(hashes.items()):
                yield f"{name} in {'/'.join(filter(None, PARTS[part]))}.safetensors", part, name, digest

    def _digest(self, part: str | None, name: str) -> str | None:
        if part is None:
            path = self.directory / name
            return file_digest(path) if path.is_file() else None
        reader = self.part(part)
        if name not in reader:
            return None
        shape = torch.Size(reader.stored(name).shape)
        return tensor_digest(reader.flat(name, 0, shape.numel()))

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `directory`, or None. Damaged checkpoints are skipped."""
    found: list[tuple[int, float, Path]] = []
    for path in Path(directory).glob(f"*/{MANIFEST}"):
        if path.parent.name.startswith("."):
            continue
        try:
            checkpoint = TrainingCheckpoint(path.parent)
        except (CheckpointError, OSError):
            continue
        if checkpoint.has_training_state:
            found.append((checkpoint.manifest["step"], path.stat().st_mtime, path.parent))
    return max(found)[2] if found else None
