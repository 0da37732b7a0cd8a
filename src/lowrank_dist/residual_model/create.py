"""Decomposes pretrained weights into a residual model on disk, unless it is complete already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig

from lowrank_dist.decomposition.schedule import Sharding, scheduled
from lowrank_dist.decomposition.walk import Calibrated, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.methods import Method
from lowrank_dist.model.factor_layout import stored_layout
from lowrank_dist.model.plan import Plan
from lowrank_dist.residual_model.fingerprint import fingerprint
from lowrank_dist.residual_model.writer import ResidualModelWriter
from lowrank_dist.storage.layout import MANIFEST, read_manifest
from lowrank_dist.storage.replacing import check_parent, check_target, is_ours
from lowrank_dist.storage.verify import damage


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
    """Decompose pretrained weights and write a residual model. Collective: all ranks of ``walk.group`` call it.

    A complete residual model with the same fingerprint is kept as it is, if it agrees with the digests in its manifest;
    a damaged one is written again. Matrices that a killed run with the same fingerprint completed are not decomposed
    again. While another run is writing the directory, this one waits, and then looks again.

    Parameters
    ----------
    plan
        From `lowrank_dist.model.plan.plan_walk`.
    walk
        The pretrained weights, the ranks that share the work, and how matrices are decomposed. All ranks must see
        `output`.
    output
        Directory to write. It is either complete or absent.
    adapter
        PEFT configuration of the adapter.
    base
        Name of the pretrained model, for the manifest.
    sharding, announce
        See `lowrank_dist.decomposition.schedule.scheduled`.
    overwrite
        Replace a directory at `output` that has another fingerprint, if this package wrote it
        (`lowrank_dist.storage.replacing.check_target`).
    key
        The `fingerprint`, if it is known already.
    calibrated
        Calibration pass, for methods that need one. It runs only if matrices are missing, and only for these.

    Returns
    -------
    Path
        `output`, as an absolute path.

    Raises
    ------
    InputError
        On every rank, if `output` is another directory, or the disk has too little space.
    CheckpointError
        On every rank, if a file does not hold what was written to it.
    ModelError
        If the stored weight of a matrix also provides another parameter, or if
        `lowrank_dist.model.factor_layout.stored_layout` cannot restore the method's layout of factors.
    """
    group = walk.group
    with group.shared_errors():
        check_target(output, overwrite=True, kind="decomposed")
    output = Path(output).absolute()
    _check_layout(plan, walk.init)
    key = key or fingerprint(walk, plan, calibrated)
    if _is_usable(output, key, group, announce):
        return output
    _check_absent(output, key, group, overwrite=overwrite)
    writer = ResidualModelWriter(plan, walk, output, key)
    with writer.locked(announce):
        if _is_usable(output, key, group, lambda _: None):  # another run has written it meanwhile
            return output
        _check_absent(output, key, group, overwrite=overwrite)
        writer.begin()
        remaining = [planned for planned in plan.matrices if planned.name not in writer.reports]
        walk.advance(sum(report.nbytes for report in writer.reports.values()))
        if remaining and calibrated is not None:
            walk = calibrated.walk(remaining)
        writer.matrices(scheduled(walk, remaining, sharding, announce))
        writer.others()
        writer.finish(adapter, base)
    return output


def _is_usable(output: Path, key: str, group: ShardGroup, announce: Callable[[str], object]) -> bool:
    """Whether `output` is a residual model with this fingerprint, undamaged; else a line says what is damaged.

    Collective.
    """
    if not group.broadcast_object(is_complete(output, key)):
        return False
    found = damage(output, group)
    if found is not None:
        announce(f"{found}; it is decomposed again")
    return found is None


def _check_absent(output: Path, key: str, group: ShardGroup, *, overwrite: bool) -> None:
    """Raise InputError if something else is at `output` that may not be overwritten; a damaged one of `key` may."""
    with group.shared_errors():
        if is_complete(output, key):
            return
        if is_ours(output) and not overwrite:
            raise InputError(
                f"{output}: exists, and is not this model decomposed with these settings; remove it, choose another "
                "directory, or pass overwrite"
            )
        check_target(output, overwrite=overwrite, kind="decomposed")
        if group.rank == 0:
            check_parent(output)


def _check_layout(plan: Plan, init: Method) -> None:
    """Raise ModelError if a residual model cannot hold a matrix of `plan` or record the layout of `init`."""
    if stored_layout(init.layout.facts()) != init.layout:
        raise ModelError(
            f"{init}: the manifest of a residual model has no entry for {init.layout}; train without saving one (no "
            "init_cache)"
        )
    if any(planned.dora for planned in plan.matrices):
        raise ModelError(
            "LoraConfig.use_dora=True: a residual model has no magnitudes; train without saving one (no init_cache), "
            "or decompose with use_dora=False and train DoRA on the result"
        )
    shared = {parameter.key for parameter in plan.parameters}
    keys = [planned.key for planned in plan.matrices]
    for planned in plan.matrices:
        if planned.key in shared or keys.count(planned.key) > 1:
            raise ModelError(
                f"{planned.name}: its weight {planned.key} is stored once for several parameters (untied embeddings), "
                "which a residual model cannot hold; train without saving one (no init_cache)"
            )


def is_complete(output: Path, key: str) -> bool:
    """Whether `output` is a residual model with the `fingerprint` `key`."""
    if not (output / MANIFEST).is_file():
        return False
    try:
        return bool(read_manifest(output).get("fingerprint") == key)
    except CheckpointError:
        return False
