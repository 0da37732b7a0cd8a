"""The whole way from what a user asks for to a sharded model that trains, in its order.

Open, check, calibrate where the method looks at data, decompose or read, make the parameters, take the values of an
adapter to go on from, check against the run that is resumed, make ready for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from lowrank_dist.decomposition.report import InitializationReport
from lowrank_dist.decomposition.restore import Resume, check_digests
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Calibrated, DecomposedMatrix
from lowrank_dist.initialization.materialize import Materialized, materialize
from lowrank_dist.initialization.open import ModelRecipe, OpenedModel
from lowrank_dist.initialization.source import MatrixSource
from lowrank_dist.initialization.trainable import Computation, make_trainable
from lowrank_dist.model.plan import Plan
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.nf4 import format_as_dict
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.zero3.partition import Partitioner


class CalibratedBuild(Calibrated, Protocol):
    """A calibration pass over the model that is built (`lowrank_dist.calibration.walk.CalibrationPass`)."""

    @property
    def ran(self) -> bool:
        """Whether the model holds the weights already, as they are."""

    def materialize(self) -> Materialized:
        """Run the pass, decompose the weights where they are, and put the results in their place. Collective."""

    def fill(self, plan: Plan, reader: CheckpointReader, decomposed: Iterable[DecomposedMatrix]) -> Materialized:
        """Put the matrices of `plan` in the place of the weights that the pass has left. Collective."""


class Calibrate(Protocol):
    """Opens the calibration pass of a model; leaving it puts back what reading its data has moved on."""

    def __call__(
        self,
        opened: OpenedModel,
        partitioner: Partitioner,
        *,
        compute_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        fp32_norms: bool,
        advance: Callable[[int], object],
    ) -> AbstractContextManager[CalibratedBuild]: ...


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A sharded model, ready for DeepSpeed's engine.

    Attributes
    ----------
    backbone
        The model.
    source
        What it was filled from; its files are closed.
    materialized
        What the walk left: initial factors and measurements.
    facts
        For the manifest of checkpoints: what the model was made of, and how. `Resume.from_facts` takes them.
    """

    backbone: PreTrainedModel
    source: MatrixSource
    materialized: Materialized
    facts: dict[str, Any]

    @property
    def report(self) -> InitializationReport:
        """What was measured."""
        return self.materialized.report


def build_model(
    recipe: ModelRecipe,
    backbone: PreTrainedModel,
    partitioner: Partitioner,
    *,
    compute_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    calibrate: Calibrate,
    fp32_norms: bool = False,
    computation: Computation | None = None,
    sharding: Sharding | None = None,
    resume: Resume | None = None,
    first_on_host: bool = True,
    announce: Callable[[str], object] = lambda _: None,
    show_progress: bool = False,
) -> BuiltModel:
    """Fill `backbone` as `recipe` says. Collective: all ranks of the partitioner's group call it.

    Everything that can be refused is refused before a weight is read. The collectives are those of the steps:
    `StartingAdapter.check` and `load`, `source_fingerprint`, `MatrixSource.through_cache` and `matrices`, and
    `materialize`, or the calibration pass in its place.

    Parameters
    ----------
    recipe
        What the user asks for.
    backbone
        Skeleton on meta; is changed. Its parameters become ZeRO-3 parameters: trained ones sharded over all ranks,
        frozen ones over the partitioner's `frozen` group.
    partitioner
        Makes them.
    compute_dtype
        Dtype of dense residuals, of the parameters that are not adapted, and of the arithmetic.
    factor_dtype
        Dtype of trained parameters.
    calibrate
        Is called for methods that look at data, and gives what they see.
    fp32_norms
        See `materialize`.
    computation
        How the model computes; default: as it is.
    sharding
        How matrices are shared while they are decomposed, see `lowrank_dist.decomposition.schedule.scheduled`.
    resume
        What the run that is resumed has left, if one is.
    first_on_host
        Whether this rank fetches what is missing of a hub id, before the others look for it.
    announce
        Is told, on rank 0, what is done.
    show_progress
        Show a progress bar on rank 0.

    Raises
    ------
    CheckpointError, ModelError, InputError
        On every rank: what cannot be read, does not go together, or is not what the run that is resumed began from.
    """
    group, computation = partitioner.group, computation or Computation()

    # Open the source and plan; check all that can be checked without weights.
    with group.shared_errors():
        if first_on_host:
            recipe.directories()
    with group.shared_errors():
        computation.check(backbone)
        opened = recipe.open(
            backbone,
            compute_dtype=compute_dtype,
            sharding=sharding or Sharding(),
            announce=announce,
            resume=resume,
        )
        if resume is not None:
            resume.check_settings(method=opened.source.method, quantization=opened.quantization)
    opened.check_start(group)
    pretrained_fingerprint = fingerprint = source_fingerprint(opened.source.reader, group)
    if resume is not None:
        resume.check_pretrained(pretrained_fingerprint)

    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(opened.source.reader.nbytes, show=show_progress and group.rank == 0))

        # Calibrate, for methods that look at data: the pass runs once a matrix is to be decomposed, if one is.
        calibrated: CalibratedBuild | None = None
        if opened.source.init is not None and opened.source.init.statistic is not None:
            with group.shared_errors():
                calibrated = stack.enter_context(
                    calibrate(
                        opened,
                        partitioner,
                        compute_dtype=compute_dtype,
                        factor_dtype=factor_dtype,
                        fp32_norms=fp32_norms,
                        advance=bar.update,
                    )
                )

        # With a cache, decompose into it unless it is there; the model is then read from it.
        pretrained = opened.source
        opened = opened.through_cache(
            group, factor_dtype, device=partitioner.device, advance=bar.update, calibrated=calibrated
        )
        plan, source = opened.plan, opened.source
        bar.reset(source.reader.nbytes)

        # Decompose or read, and materialize: where the pass has left the weights in the model, in their place.
        if calibrated is not None and source is pretrained:
            result = calibrated.materialize()
        else:
            matrices = source.matrices(plan, group, factor_dtype, device=partitioner.device, advance=bar.update)
            if calibrated is not None and calibrated.ran:
                result = calibrated.fill(plan, source.reader, matrices)
            else:
                result = materialize(
                    backbone,
                    plan,
                    source.reader,
                    partitioner,
                    matrices,
                    residual=source.residual,
                    compute_dtype=compute_dtype,
                    factor_dtype=factor_dtype,
                    fp32_norms=fp32_norms,
                    layout=opened.layout,
                    advance=bar.update,
                )

    # Take the values of the adapter to go on from. A run that is resumed trained on the same residual, bit for bit.
    if opened.start is not None and resume is None:
        opened.start.load(backbone, group, result.initial)
    if source is not pretrained:
        fingerprint = source_fingerprint(source.reader, group)
    opened.close()
    if resume is not None:
        check_digests(result.report.matrices, resume.reports)

    make_trainable(backbone, computation, partitioner.device)
    if group.rank == 0:
        report = result.report
        announce(
            f"{source.method}: {len(report.matrices)} matrices in {report.seconds:.1f} s, "
            f"{report.bytes_read / 2**20:.0f} MiB read by {group.size} ranks "
            f"({report.bytes_read / report.checkpoint_bytes:.2f} x the checkpoint)"
        )
    facts = {
        "pretrained": recipe.location,
        "pretrained_fingerprint": pretrained_fingerprint,
        "started_from": None if opened.start is None else str(recipe.adapter),
        "source": fingerprint,
        "method": source.method,
        "quantization": opened.quantization,
        "residual": format_as_dict(source.residual),
    }
    return BuiltModel(backbone=backbone, source=source, materialized=result, facts=facts)
