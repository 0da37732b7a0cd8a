"""All steps from the user's options to a sharded, trainable model, in order.

The steps: open, check, calibrate if the method looks at data, decompose or read, make the parameters, load the values
of a starting adapter, check against the run that is resumed, prepare for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.adapters.match import check_same_meaning
from lowrank_dist.decomposition.report import InitializationReport
from lowrank_dist.decomposition.restore import Resume, check_digests
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Calibrated, DecomposedMatrix
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.initialization.loading import Loading
from lowrank_dist.initialization.materialize import Materialized, materialize
from lowrank_dist.initialization.open import ModelRecipe, OpenedModel
from lowrank_dist.initialization.source import MatrixSource
from lowrank_dist.initialization.trainable import Computation, make_trainable
from lowrank_dist.initialization.tuned import TunedModel, put_on
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.model.plan import Plan
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.registry import format_as_dict
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.seeds import global_seed
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.resolve import commit_of
from lowrank_dist.tuners.adalora.allocation import RankAllocation
from lowrank_dist.tuners.files import whole_files
from lowrank_dist.tuners.support import objection
from lowrank_dist.zero3.partition import Partitioner


class CalibratedBuild(Calibrated, Protocol):
    """A calibration pass over the model that is being built (`lowrank_dist.calibration.walk.CalibrationPass`)."""

    @property
    def ran(self) -> bool:
        """Whether the pass has run and left the pretrained weights in the model."""

    def materialize(self) -> Materialized:
        """Run the pass, decompose the weights that the model holds, and replace them by the results. Collective."""

    def fill(self, plan: Plan, reader: CheckpointReader, decomposed: Iterable[DecomposedMatrix]) -> Materialized:
        """Replace the weights that the pass has left in the model by the matrices of `plan`. Collective."""


class Calibrate(Protocol):
    """Opens the calibration pass of a model; leaving the context restores the state that reading its data changed."""

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
    root
        What computes: the backbone, or PEFT's model around it.
    source
        The source that filled it; its files are closed.
    materialized
        Initial factors and measurements.
    facts
        Entries for the manifest of checkpoints: the pretrained weights, the method and the formats that the model was
        made with. `Resume.from_facts` takes them.
    files
        What adapter files hold of the model.
    original
        The pretrained model, the base model of converted adapters.
    derived
        Computes the tensors of adapter files that are not parameters. Collective.
    allocation
        Allocates ranks while the model is trained; None: ranks do not change.
    """

    backbone: PreTrainedModel
    root: nn.Module
    source: MatrixSource
    materialized: Materialized
    facts: dict[str, Any]
    files: AdapterFiles
    original: Original
    derived: Callable[[], dict[str, Tensor]] = dict
    allocation: RankAllocation | None = None

    @property
    def report(self) -> InitializationReport:
        """The measurements."""
        return self.materialized.report


def build_model(
    recipe: ModelRecipe,
    backbone: PreTrainedModel,
    partitioner: Partitioner,
    *,
    compute_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    calibrate: Calibrate,
    copies: Callable[[OpenedModel], int] = lambda _: 1,
    fp32_norms: bool = False,
    computation: Computation | None = None,
    sharding: Sharding | None = None,
    resume: Resume | None = None,
    restart: bool = False,
    first_on_host: bool = True,
    announce: Callable[[str], object] = lambda _: None,
    show_progress: bool = False,
) -> BuiltModel:
    """Fill `backbone` according to `recipe`. Collective: all ranks of the partitioner's group call it.

    Every input that can be refused is refused before a weight is read, apart from tied ones that are stored more than
    once (`lowrank_dist.model.ties`). The collectives are those of the steps: `ModelRecipe.open`,
    `StartingAdapter.check` and `load`, `source_fingerprint`, `MatrixSource.through_cache` and `matrices`, and
    `materialize`, or those of the calibration pass instead of `materialize`.

    Parameters
    ----------
    recipe
        The user's options.
    backbone
        Skeleton on meta; changed in place. Its parameters become ZeRO-3 parameters: trained ones sharded over all
        ranks, frozen ones over the partitioner's `frozen` group.
    partitioner
        Makes the ZeRO-3 parameters.
    compute_dtype
        Dtype of dense residuals, of the parameters that are not adapted, and of the arithmetic.
    factor_dtype
        Dtype of trained parameters.
    calibrate
        Called for methods that look at data; opens their calibration pass.
    copies
        Called once the model is checked; returns how many groups of consecutive ranks each hold all frozen parameters.
    fp32_norms
        See `materialize`.
    computation
        How the model computes; default: `Computation()`.
    sharding
        How matrices are shared while they are decomposed, see `lowrank_dist.decomposition.schedule.scheduled`.
    resume
        State of the run that is resumed; None: a new run.
    restart
        Give the trained parameters of a resumed run the values from which it began, if these are a starting adapter's;
        without one they have them anyway. The caller loads the checkpoint's own values afterwards.
    first_on_host
        Whether this rank downloads the missing files of a hub id before the other ranks look for them.
    announce
        Called on rank 0 with lines about the progress.
    show_progress
        Show a progress bar on rank 0.

    Raises
    ------
    CheckpointError, ModelError, InputError
        On every rank, if something cannot be read, if options are incompatible, or if the weights or settings differ
        from those that the resumed run began from.
    """
    group, computation = partitioner.group, computation or Computation()

    # All checks that need no weights come before the first weight is read.
    with group.shared_errors():
        if first_on_host:
            recipe.directories()
    _check_seed(group)
    with group.shared_errors():
        computation.check(backbone)
    opened = recipe.open(
        backbone,
        group,
        compute_dtype=compute_dtype,
        sharding=sharding or Sharding(),
        announce=announce,
        resume=resume,
    )
    if opened.tuner is not None and opened.start is not None:  # that of other adapters is known to the strategy
        reason = objection(opened.tuner.config, gradient_checkpointing=computation.gradient_checkpointing)
        if reason is not None:
            raise ModelError(f"adapter={str(recipe.adapter)!r} is a {opened.tuner.name}: {reason}")
    recorded = recipe.facts() | {"fp32_norms": fp32_norms} | opened.source.layout.facts()
    if resume is not None:
        with group.shared_errors():
            resume.check_settings(method=opened.source.method, quantization=opened.quantization, recipe=recorded)
            if resume.adapter is not None:
                check_same_meaning(resume.adapter, opened.source.adapter, resume.checkpoint)
    opened.check_start(group)
    commits = {"pretrained_commit": commit_of(opened.source.reader.directory)}
    if opened.start is not None:
        commits["started_from_commit"] = commit_of(opened.start.directory)
    pretrained_fingerprint = fingerprint = source_fingerprint(opened.source.reader, group)
    if resume is not None:
        resume.check_pretrained(pretrained_fingerprint)
    partitioner.replicate(copies(opened))

    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(opened.source.reader.nbytes, show=show_progress and group.rank == 0))

        # Only opened here: the pass runs when the first matrix is decomposed, and not at all if none is.
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

        # With a cache, the walk writes the residual model unless it exists; the model is then read from there.
        pretrained = opened.source
        if calibrated is not None:
            bar.reset(2 * pretrained.reader.nbytes)  # if the pass runs, it reads them too
        opened = opened.through_cache(
            group, factor_dtype, device=partitioner.device, advance=bar.update, calibrated=calibrated
        )
        plan, source = opened.plan, opened.source
        bar.reset(source.reader.nbytes)

        # A calibration pass leaves the weights in the model; they are then replaced there, not read again.
        if calibrated is not None and source is pretrained:
            again = sum(source.reader.info(planned.key).nbytes for planned in plan.matrices)
            bar.reset(source.reader.nbytes + again)
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

    tuned: TunedModel | None = None
    seed: int | None = None
    if opened.tuner is not None:
        seed = _tuner_seed(group) if resume is None else resume.tuner_seed
        assert seed is not None
        loading = Loading(
            backbone,
            source.reader,
            partitioner,
            compute_dtype=compute_dtype,
            factor_dtype=factor_dtype,
            advance=bar.update,
        )
        tuned = put_on(opened, partitioner, loading, seed=seed)

    # A resumed run takes its values from its checkpoint in the end; its residual must be the same, bit for bit.
    if opened.start is not None and (resume is None or restart):
        if tuned is None:
            opened.start.load(backbone, group, result.initial)
        else:
            opened.start.load_tuned(tuned.root, tuned.files, tuned.buffers, group, base=source.reader.directory)
    if source is not pretrained:
        fingerprint = source_fingerprint(source.reader, group)
    opened.close()
    if resume is not None:
        check_digests(result.report.matrices, resume.reports)

    said = make_trainable(backbone, computation, partitioner)
    if group.rank == 0:
        for line in said:
            announce(line)
        report = result.report
        announce(
            f"{source.method}: {len(report.matrices)} matrices in {report.seconds:.1f} s, "
            f"{report.bytes_read / 2**20:.0f} MiB read by {group.size} ranks "
            f"({report.bytes_read / report.checkpoint_bytes:.2f} x the pretrained weights)"
        )
    facts = {
        "pretrained": recipe.location,
        "pretrained_fingerprint": pretrained_fingerprint,
        **{name: commit for name, commit in commits.items() if commit is not None},
        **({} if source.decoded_from is None else {"decoded_from": source.decoded_from}),
        "started_from": None if opened.start is None else str(recipe.adapter),
        "source": fingerprint,
        "method": source.method,
        "quantization": opened.quantization,
        "residual": format_as_dict(source.residual),
        "recipe": recorded | source.layout.facts(),
        "tuner_seed": seed,
    }
    if tuned is None:
        files: AdapterFiles = result.layout
        if opened.expansion is not None:
            files = whole_files(name for name, parameter in backbone.named_parameters() if parameter.requires_grad)
        return BuiltModel(
            backbone=backbone,
            root=backbone,
            source=source,
            materialized=result,
            facts=facts,
            files=files,
            original=pretrained.original,
        )
    return BuiltModel(
        backbone=backbone,
        root=tuned.root,
        source=source,
        materialized=result,
        facts=facts,
        files=tuned.files,
        original=pretrained.original,
        derived=tuned.derived,
        allocation=tuned.allocation,
    )


def _check_seed(group: ShardGroup) -> None:
    """Raise InputError on every rank if they would draw other weights and another order of the data. Collective."""
    seeds = group.gather_objects(global_seed())
    if len(set(seeds)) > 1:
        listed = ", ".join(f"{seed} on rank {rank}" for rank, seed in enumerate(seeds[:4]))
        raise InputError(
            f"lightning.seed_everything was called with different seeds ({listed}): the ranks would draw different "
            "weights and different orders of the data; call it with one seed on all ranks"
        )


def _tuner_seed(group: ShardGroup) -> int:
    """The seed that the user has given torch on rank 0. Collective."""
    seed = group.broadcast_object(torch.initial_seed() % 2**63)
    assert isinstance(seed, int)
    return seed
