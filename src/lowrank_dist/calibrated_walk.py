"""The walk for methods that look at data.

The checkpoint is read once, into a sharded model that computes with the original weights. A calibration pass runs
through it. Then the weights are decomposed from the ranks' own shards of it: the bytes read are those of the walk
without calibration.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.calibration import Calibration, Step, calibrate
from lowrank_dist.checkpoint_io import FLOAT_DTYPES, CheckpointReader, TensorInfo
from lowrank_dist.comm import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.materialize import Materialized, materialize
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.residual import Dense, ResidualFormat
from lowrank_dist.skeleton import ModelError, Plan
from lowrank_dist.statistics import Statistics
from lowrank_dist.walk import Batch, DecomposedMatrix, Walk
from lowrank_dist.zero3 import Partitioner, let_go, local_shard, to_device


def materialize_calibrated(
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
) -> Materialized:
    """`materialize` for a method that wants a statistic. Collective: all ranks of the group call it.

    Three passes: the walk with the weights as they are (in the checkpoint's own dtype, so that nothing is lost) and a
    zero adapter; `calibrate`; the walk again with `init`, over the ranks' shards of the first. All ranks share every
    matrix.

    Parameters
    ----------
    backbone, plan, reader, partitioner, residual, compute_dtype, factor_dtype, fp32_norms
        As `materialize` takes them.
    batches
        Of this rank, on the device of the partitioner; at most ``calibration.batches`` are taken, after the first pass.
    calibration
        Options.
    init
        The method; its `statistic` is measured.
    step
        Stands in for ``calibration.step``.
    advance
        Called with bytes that are done, in all twice those of the adapted weights and once those of the others.

    Returns
    -------
    Materialized
        As from `materialize`; the report's seconds are those of all passes.

    Raises
    ------
    CheckpointError, ModelError, InputError
        On every rank, see `materialize` and `calibrate`.
    """
    started, group = time.monotonic(), partitioner.group
    statistics = measure(
        backbone,
        plan,
        reader,
        partitioner,
        batches,
        calibration=calibration,
        init=init,
        residual=residual,
        compute_dtype=compute_dtype,
        factor_dtype=factor_dtype,
        fp32_norms=fp32_norms,
        step=step,
        advance=advance,
    )
    walk = Walk(
        cast(CheckpointReader, _ShardReader(backbone, plan, reader, group)),
        group,
        init=init,
        residual=residual,
        factor_dtype=factor_dtype,
        device=partitioner.device,
        advance=advance,
        statistics=statistics,
    )
    result = materialize(
        backbone,
        replace(plan, parameters=[], buffers=[]),  # they stay
        reader,
        partitioner,
        _replacing(backbone, walk.run(_by_all(plan, group))),
        residual=residual,
        compute_dtype=compute_dtype,
        factor_dtype=factor_dtype,
    )
    gc.collect()  # ZeRO-3 parameters are cycles
    result.report.seconds = time.monotonic() - started
    return result


def measure(
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
) -> Statistics:
    """What `init` wants to know, from a skeleton and its checkpoint. Collective: all ranks of the group call it.

    The first two of the passes of `materialize_calibrated`, whose parameters these are: `backbone` then holds the
    weights as they are, sharded, in the checkpoint's own dtype.
    """
    if init.statistic is None:
        raise InputError(f"{init} looks at no data; leave out the calibration")
    for planned in plan.matrices:
        if planned.lookup or planned.wrapped:
            raise ModelError(
                f"{planned.name}: {init} wants the {init.statistic} of every adapted weight, and calibration measures "
                "linear layers only; drop it from target_modules and target_parameters"
            )
    whole = _Whole(dtype=_lossless(plan, reader), cut_as=residual.block)
    walk = Walk(
        reader,
        partitioner.group,
        init=LoRA(),
        residual=whole,
        factor_dtype=factor_dtype,
        device=partitioner.device,
        advance=advance,
    )
    materialize(
        backbone,
        plan,
        reader,
        partitioner,
        walk.run(_by_all(plan, partitioner.group)),
        residual=whole,
        compute_dtype=compute_dtype,
        factor_dtype=factor_dtype,
        fp32_norms=fp32_norms,
        digest=False,
        advance=advance,
    )
    to_device(backbone, partitioner.device)  # buffers
    return calibrate(
        backbone,
        plan.matrices,
        batches,
        statistic=init.statistic,
        group=partitioner.group,
        residual=residual,
        calibration=calibration,
        step=step,
        device=partitioner.device,
    )


def _by_all(plan: Plan, group: ShardGroup) -> list[Batch]:
    return [Batch(group_size=group.size, matrices=(planned,)) for planned in plan.matrices]


@dataclass(frozen=True, kw_only=True)
class _Whole(Dense):
    """The weight itself, its rows cut as another format will cut them."""

    cut_as: int

    @property
    def block(self) -> int:
        return self.cut_as


def _lossless(plan: Plan, reader: CheckpointReader) -> torch.dtype:
    """The smallest dtype that holds every adapted weight exactly."""
    dtypes = {FLOAT_DTYPES[reader.info(planned.key).dtype] for planned in plan.matrices}
    return functools.reduce(torch.promote_types, dtypes)


class _ShardReader:
    """What the walk asks of a reader, from this rank's shards of a model whose residuals are the weights."""

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
    """Let go of the weight of every matrix that is decomposed."""
    for matrix in decomposed:
        layer: Any = backbone.get_submodule(matrix.planned.layer)
        let_go(layer.base_layer.stored())
        yield matrix
