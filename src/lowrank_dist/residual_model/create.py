"""Decomposing a checkpoint into a decomposed model on disk, and the fingerprint that tells whether it is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from peft import LoraConfig

from lowrank_dist.adapters.files import MANIFEST
from lowrank_dist.decomposition.schedule import Sharding, scheduled
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.model.skeleton import ModelError, Plan, PlannedMatrix
from lowrank_dist.residual_model.writer import FORMAT, DecomposedWriter
from lowrank_dist.storage.reader import CheckpointReader

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def source_fingerprint(reader: CheckpointReader, group: ShardGroup) -> str:
    """Hexadecimal digest of the weights that a run starts from.

    Of a `lowrank_dist.storage.source.WeightSource`, of the fingerprint that it gives. Of a checkpoint on disk, covers
    names, sizes and headers of its safetensors files, and 16 samples of 64 KiB of each, evenly spread (hashing all of
    it would cost a second read). Rank 0 computes it, the others are told. Collective.
    """
    return _told(lambda: _hashed_source(reader).hexdigest(), group)


class Calibrated(Protocol):
    """A walk that looks at data first (`lowrank_dist.calibration.walk.CalibrationPass`)."""

    def fingerprint(self) -> str:
        """Digest of the data, and of what is done with them. Collective."""

    def walk(self, matrices: Sequence[PlannedMatrix]) -> Walk:
        """What decomposes `matrices`, once the data have been looked at. Collective."""


def fingerprint(walk: Walk, plan: Plan, calibrated: Calibrated | None = None) -> str:
    """Hexadecimal digest of everything that a decomposed model depends on.

    Of the source, what `source_fingerprint` covers. Of the settings: method, residual format, dtype of the factors, and
    for every matrix rank and scaling; what `calibrated` looks at. Rank 0 computes it, the others are told. Collective.
    """
    data = [] if calibrated is None else [calibrated.fingerprint()]

    def compute() -> str:
        digest = _hashed_source(walk.reader)
        matrices = [[m.name, m.key, m.rank, m.scaling] for m in plan.matrices]
        settings = [FORMAT, repr(walk.init), repr(walk.residual), str(walk.factor_dtype), matrices, *data]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()

    return _told(compute, walk.group)


def _told(compute: Callable[[], str], group: ShardGroup) -> str:
    text = None
    with group.shared_errors():
        if group.rank == 0:
            text = compute()
    return str(group.broadcast_object(text))


def _hashed_source(reader: CheckpointReader) -> hashlib._Hash:
    digest = hashlib.sha256(reader.identity)
    for path in reader.files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(header))
            for sample in range(_SAMPLES):
                handle.seek(8 + header + max(0, size - 8 - header - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest


def decompose(
    plan: Plan,
    walk: Walk,
    output: str | os.PathLike[str],
    *,
    adapter: LoraConfig,
    base: str,
    sharding: Sharding | None = None,
    announce: Callable[[str], object] = lambda _: None,
    overwrite: bool = False,
    key: str | None = None,
    calibrated: Calibrated | None = None,
) -> Path:
    """Decompose a checkpoint and write the result as a decomposed model. Collective: all ranks of the walk call it.

    Parameters
    ----------
    plan
        From `lowrank_dist.model.skeleton.plan_walk`.
    walk
        The checkpoint, the ranks that share the work (all must see `output`), and how matrices are decomposed.
    output
        Directory to write; complete or absent. What an earlier call with the same source and settings completed,
        in this directory or in the remains of a killed run, is kept.
    adapter
        PEFT configuration of the adapter.
    base
        Name of the source for the manifest.
    sharding, announce
        See `lowrank_dist.decomposition.schedule.scheduled`.
    overwrite
        Replace what else is at `output`.
    key
        The `fingerprint`, where it is known already.
    calibrated
        For methods that look at data: they do so unless all matrices are there, and for those that are not.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    InputError
        On every rank: another directory is in the way, another run is writing, the disk is too small.
    ModelError
        Where a matrix is of a weight that stands for another parameter too.
    """
    output, group = Path(output).absolute(), walk.group
    _check_layout(plan)
    key = key or fingerprint(walk, plan, calibrated)
    if group.broadcast_object(is_complete(output, key)):
        return output
    with group.shared_errors():
        if output.exists() and not overwrite:
            raise InputError(
                f"{output}: exists, and is not this model decomposed with these settings; remove it, choose another "
                "directory or pass overwrite"
            )
    writer = DecomposedWriter(plan, walk, output, key)
    with writer.locked():
        writer.begin()
        remaining = [planned for planned in plan.matrices if planned.name not in writer.reports]
        walk.advance(sum(report.nbytes for report in writer.reports.values()))
        if remaining and calibrated is not None:
            walk = calibrated.walk(remaining)
        writer.matrices(scheduled(walk, remaining, sharding, announce))
        writer.others()
        writer.finish(adapter, base)
    return output


def _check_layout(plan: Plan) -> None:
    """Raise ModelError where a decomposed model cannot hold a matrix of `plan`."""
    shared = {parameter.key for parameter in plan.parameters}
    keys = [planned.key for planned in plan.matrices]
    for planned in plan.matrices:
        if planned.key in shared or keys.count(planned.key) > 1:
            raise ModelError(
                f"{planned.name}: {planned.key} stands for another parameter too (untied), and a decomposed model "
                "keeps names; or train without saving one (no init_cache)"
            )


def is_complete(output: Path, key: str) -> bool:
    """Whether `output` is a decomposed model with the `fingerprint` `key`."""
    manifest = output / MANIFEST
    if not manifest.is_file():
        return False
    try:
        return bool(json.loads(manifest.read_text()).get("fingerprint") == key)
    except ValueError:
        return False
