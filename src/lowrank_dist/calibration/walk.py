"""The walk for methods that look at data.

The pretrained weights are read once, into a sharded model that computes with them. A calibration pass runs through this
model. Then the weights are decomposed from each rank's own shards of the model, so the bytes read are those of the walk
without calibration.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.calibration.measure import Calibration, Step, calibrate, draw, step_name
from lowrank_dist.calibration.statistics import Statistics
from lowrank_dist.decomposition.walk import Batch, DecomposedMatrix, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.initialization.materialize import Materialized, materialize
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo
from lowrank_dist.zero3.partition import Partitioner, local_shard, release, to_device


class CalibrationPass:
    """A calibration pass over a sharded model, and the walk that uses its statistics; all ranks of the group call it.

    There are three passes: the walk with the original weights (in their dtype on disk, hence without loss) and a zero
    adapter; `calibrate`; and the walk with `init`, over the ranks' shards of the first. All ranks share every matrix.

    Parameters
    ----------
    backbone, plan, reader, partitioner, residual, compute_dtype, factor_dtype, fp32_norms
        See `materialize`.
    batches
        Batches of this rank, on the device of the partitioner. At most ``calibration.batches`` are taken, after the
        first pass or by `fingerprint`.
    calibration
        Options.
    init
        The method; its `statistic` is measured.
    step
        Overrides ``calibration.step``.
    advance
        Called with the number of bytes done since the last call: in total, twice the bytes of the adapted weights and
        once those of the others.
    thorough
        See `Walk`.

    Attributes
    ----------
    ran : bool
        Whether `backbone` already holds the weights.

    Raises
    ------
    InputError
        For methods that do not look at data.
    ModelError
        For adapted weights that do not belong to linear layers.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        plan: Plan,
        reader: CheckpointReader,
        partitioner: Partitioner,
        batches: Iterable[Any],
        *,
        calibration: Calibration,
        init: Method,
        residual: ResidualFormat,
        compute_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        fp32_norms: bool = False,
        step: Step | None = None,
        advance: Callable[[int], object] = lambda _: None,
        thorough: bool = False,
    ) -> None:
        self.backbone, self.plan, self.reader, self.partitioner = backbone, plan, reader, partitioner
        self.batches, self.calibration, self.init, self.residual = batches, calibration, init, residual
        self.compute_dtype, self.factor_dtype, self.fp32_norms = compute_dtype, factor_dtype, fp32_norms
        self.step, self.advance, self.thorough, self.ran = step, advance, thorough, False
        if init.statistic is None:
            raise InputError(f"{init} does not look at data; leave out the calibration")
        for planned in plan.matrices:
            if planned.lookup or planned.wrapped:
                raise ModelError(
                    f"{planned.name}: {init} needs the {init.statistic} of every adapted weight, but calibration "
                    "measures linear layers only; drop it from target_modules and target_parameters"
                )

    def fingerprint(self) -> str:
        """Compute a hexadecimal digest of everything but the weights that the statistics depend on. Collective.

        It covers the batches of all ranks in their order, the configuration of the model, the arithmetic, the positions
        that count, and the name of the step (not its code). The batches are read and kept.

        Raises
        ------
        InputError
            On every rank, for batches with anything but tensors, numbers and text.
        """
        self.batches, drawn = draw(self.batches, self.calibration.batches, self.partitioner.group)
        config = {key: value for key, value in self.backbone.config.to_dict().items() if key not in _VOLATILE}
        settings: list[Any] = [drawn, self.calibration.positions, step_name(self.step or self.calibration.step)]
        settings += [str(self.compute_dtype), self.fp32_norms, config]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def statistics(self, matrices: Sequence[PlannedMatrix] | None = None) -> Statistics:
        """Measure the statistics of `matrices` (default: all) for `init` by the first two passes. Collective.

        The backbone then holds the original weights, sharded, in their dtype on disk.
        """
        plan, reader, partitioner = self.plan, self.reader, self.partitioner
        original = _AlignedDense(dtype=_lossless_dtype(plan, reader), alignment=self.residual.block)
        walk = self._walk_with(reader, init=LoRA(), residual=original)
        materialize(
            self.backbone,
            plan,
            reader,
            partitioner,
            walk.run(_shared_by_all(plan, partitioner.group)),
            residual=original,
            compute_dtype=self.compute_dtype,
            factor_dtype=self.factor_dtype,
            fp32_norms=self.fp32_norms,
            digest=False,
            advance=self.advance,
        )
        self.ran = True
        to_device(self.backbone, partitioner.device)  # buffers
        assert self.init.statistic is not None
        return calibrate(
            self.backbone,
            plan.matrices if matrices is None else matrices,
            self.batches,
            statistic=self.init.statistic,
            group=partitioner.group,
            residual=self.residual,
            calibration=self.calibration,
            step=self.step,
            device=partitioner.device,
        )

    def walk(self, matrices: Sequence[PlannedMatrix] | None = None) -> Walk:
        """Run the first two passes and return the walk that decomposes `matrices` (default: all). Collective."""
        statistics = self.statistics(matrices)
        shards = _ShardReader(self.backbone, self.plan, self.reader, self.partitioner.group)
        walk = self._walk_with(cast(CheckpointReader, shards), init=self.init, residual=self.residual)
        walk.statistics, walk.thorough = statistics, self.thorough
        return walk

    def _walk_with(self, reader: CheckpointReader, *, init: Method, residual: ResidualFormat) -> Walk:
        return Walk(
            reader,
            self.partitioner.group,
            init=init,
            residual=residual,
            factor_dtype=self.factor_dtype,
            device=self.partitioner.device,
            advance=self.advance,
        )

    def materialize(self) -> Materialized:
        """Run all passes and `materialize` with `init`; the report's seconds cover all passes. Collective.

        Raises
        ------
        CheckpointError, ModelError, InputError
            On every rank; see `materialize` and `calibrate`.
        """
        started = time.monotonic()
        walk = self.walk()
        result = self.fill(self.plan, self.reader, walk.run(_shared_by_all(self.plan, self.partitioner.group)))
        result.report.seconds = time.monotonic() - started
        return result

    def fill(self, plan: Plan, reader: CheckpointReader, decomposed: Iterable[DecomposedMatrix]) -> Materialized:
        """`materialize` the matrices of `plan`, replacing the original weights that the pass has left. Collective."""
        result = materialize(
            self.backbone,
            replace(plan, parameters=[], buffers=[]),  # the first pass has loaded them
            reader,
            self.partitioner,
            _replacing(self.backbone, decomposed),
            residual=self.residual,
            compute_dtype=self.compute_dtype,
            factor_dtype=self.factor_dtype,
            layout=self.init.layout,
        )
        gc.collect()  # ZeRO-3 parameters are in reference cycles
        return result


_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")


def _shared_by_all(plan: Plan, group: ShardGroup) -> list[Batch]:
    return [Batch(group_size=group.size, matrices=(planned,)) for planned in plan.matrices]


@dataclass(frozen=True, kw_only=True)
class _AlignedDense(Dense):
    """The original weight, its rows sharded like those of a format with blocks of `alignment` elements."""

    alignment: int

    @property
    def block(self) -> int:
        return self.alignment


def _lossless_dtype(plan: Plan, reader: CheckpointReader) -> torch.dtype:
    """The smallest dtype that represents every adapted weight exactly."""
    dtypes = {FLOAT_DTYPES[reader.info(planned.key).dtype] for planned in plan.matrices}
    return functools.reduce(torch.promote_types, dtypes)


class _ShardReader:
    """The part of a reader that the walk uses, over this rank's shards of a model whose residuals are the weights."""

    def __init__(self, backbone: nn.Module, plan: Plan, reader: CheckpointReader, group: ShardGroup) -> None:
        self._frozen = {planned.key: backbone.get_submodule(planned.layer) for planned in plan.matrices}
        self._reader, self._rank = reader, group.rank

    def info(self, key: str) -> TensorInfo:
        return self._reader.info(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        frozen: Any = self._frozen[key].base_layer
        assert (start, stop) == frozen.partition.bounds(self._rank)
        (stored,) = frozen.stored()
        return local_shard(stored).view(-1, frozen.partition.columns)[: stop - start]


def _replacing(backbone: nn.Module, decomposed: Iterable[DecomposedMatrix]) -> Iterator[DecomposedMatrix]:
    """Free the original weight of every decomposed matrix."""
    for matrix in decomposed:
        layer: Any = backbone.get_submodule(matrix.planned.layer)
        release(layer.base_layer.stored())
        yield matrix
