"""Decomposes pretrained weights into a residual model on disk, unless it is complete already."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig

from lowrank_dist.decomposition.schedule import Sharding, scheduled
from lowrank_dist.decomposition.walk import Calibrated, Walk
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.methods import Method
from lowrank_dist.model.factor_layout import stored_layout
from lowrank_dist.model.plan import Plan
from lowrank_dist.residual_model.fingerprint import fingerprint
from lowrank_dist.residual_model.writer import ResidualModelWriter
from lowrank_dist.storage.atomic import check_target, is_ours
from lowrank_dist.storage.layout import MANIFEST


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

    A complete residual model with the same fingerprint is kept as it is. Matrices that a killed run with the same
    fingerprint completed are not decomposed again.

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
        (`lowrank_dist.storage.atomic.check_target`).
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
        On every rank, if `output` is another directory, another run is writing it, or the disk has too little space.
    ModelError
        If the stored weight of a matrix also provides another parameter, or if
        `lowrank_dist.model.factor_layout.stored_layout` cannot restore the method's layout of factors.
    """
    group = walk.group
    with group.shared_errors():
        check_target(output, overwrite=True)
    output = Path(output).absolute()
    _check_layout(plan, walk.init)
    key = key or fingerprint(walk, plan, calibrated)
    if group.broadcast_object(is_complete(output, key)):
        return output
    with group.shared_errors():
        if is_ours(output) and not overwrite:
            raise InputError(
                f"{output}: exists, and is not this model decomposed with these settings; remove it, choose another "
                "directory, or pass overwrite"
            )
        check_target(output, overwrite=overwrite)
    writer = ResidualModelWriter(plan, walk, output, key)
    with writer.building(overwrite=overwrite):
        writer.begin()
        remaining = [planned for planned in plan.matrices if planned.name not in writer.reports]
        walk.advance(sum(report.nbytes for report in writer.reports.values()))
        if remaining and calibrated is not None:
            walk = calibrated.walk(remaining)
        writer.matrices(scheduled(walk, remaining, sharding, announce))
        writer.others()
        writer.finish(adapter, base)
    return output


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
    manifest = output / MANIFEST
    if not manifest.is_file():
        return False
    try:
        return bool(json.loads(manifest.read_text()).get("fingerprint") == key)
    except ValueError:
        return False
