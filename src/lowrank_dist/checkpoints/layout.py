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

import logging
from pathlib import Path
from typing import Any

from lowrank_dist.adapters.files import whole_tensor
from lowrank_dist.checkpoints.codec import decode_state
from lowrank_dist.errors import CheckpointError, is_passing
from lowrank_dist.storage.layout import MANIFEST, OPTIMIZER, STATE, read_manifest
from lowrank_dist.storage.parse import MAX_MANIFEST, read_record
from lowrank_dist.storage.verify import FORMAT, HashedParts, check_seal

log = logging.getLogger(__name__)

_NEEDED = ("step", "accumulate_grad_batches", "starts_at_zero", "hashes", "files", "trained", "matrices")


class TrainingCheckpoint(HashedParts):
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
        path = Path(directory) / MANIFEST
        if not path.exists():
            raise CheckpointError(
                f"ckpt_path={str(directory)!r}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint or "
                "trainer.save_checkpoint wrote under PiSSAStrategy"
            )
        super().__init__(Path(directory), read_manifest(Path(directory)))
        if self.manifest.get("kind") != "checkpoint" or self.manifest.get("format") not in (FORMAT - 1, FORMAT):
            found = f"format {self.manifest.get('format')!r} of kind {self.manifest.get('kind')!r}"
            raise CheckpointError(
                f"ckpt_path={str(directory)!r}: {found}, but resuming needs format {FORMAT} of kind 'checkpoint'; pass "
                "a checkpoint that this version wrote"
            )
        check_seal(self.directory, self.manifest)
        for name in _NEEDED:
            self.manifest[name]  # an error if it is absent

    @property
    def has_training_state(self) -> bool:
        """Whether training can resume from the checkpoint; False if it was saved with ``weights_only``."""
        return OPTIMIZER in self.manifest["hashes"]

    @property
    def run(self) -> str | None:
        """Which run wrote it, over all of its attempts; None if an older version did."""
        return self.manifest.text("run") if "run" in self.manifest else None

    def state(self) -> dict[str, Any]:
        """Lightning's checkpoint dictionary (loops, callbacks, schedules, ...). Decoding it runs no code.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        path, reader = self.directory / f"{STATE}.json", self.part(STATE)
        tensors = {name: whole_tensor(reader, name) for name in reader}
        state: dict[str, Any] = decode_state(dict(read_record(path, MAX_MANIFEST)), tensors)
        return state


def checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints in `directory` that training can resume from, of the run that wrote last; the highest steps first.

    Of damaged ones, of which a line is logged, only those whose tensors or state are damaged are among them: only
    headers and manifests are read.

    Raises
    ------
    OSError
        If a manifest cannot be read for a reason that may pass.
    """
    runs: dict[str | None, list[tuple[int, float, Path]]] = {}
    for path in sorted(Path(directory).glob(f"*/{MANIFEST}")):
        if path.parent.name.startswith("."):
            continue
        try:
            checkpoint = TrainingCheckpoint(path.parent)
            if checkpoint.has_training_state:
                found = checkpoint.manifest["step"], path.stat().st_mtime, path.parent
                runs.setdefault(checkpoint.run, []).append(found)
        except (CheckpointError, OSError) as error:
            if is_passing(error):  # an older checkpoint would be taken for the newest
                raise
            log.warning("%s is left out: %s", path.parent, error)
    last = max(runs.values(), key=lambda run: max(written for _, written, _ in run), default=[])
    return [path for *_, path in sorted(last, reverse=True)]


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The first of `checkpoints`, or None."""
    return next(iter(checkpoints(directory)), None)
