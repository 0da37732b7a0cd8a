"""Conversion of a model skeleton on meta and decomposed matrices into a sharded trainable model.

Every rank keeps its shards of residuals and factors, from the walk or from a residual model on disk, as its own ZeRO-3
partitions, and reads its part of every other parameter. No weight crosses the network, no rank holds a
whole matrix, and the ranks together read every byte once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist.decomposition.report import InitializationReport
from lowrank_dist.decomposition.walk import DecomposedMatrix
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.distributed.reshard import redistribute
from lowrank_dist.initialization.loading import Loading
from lowrank_dist.initialization.magnitudes import start_magnitudes
from lowrank_dist.layers.experts import AdaptedParameter
from lowrank_dist.layers.frozen import ExtendedLinear, FrozenEmbedding, FrozenLinear, FrozenWeight
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.model.names import ADAPTER, plain_name
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.model.stacking import StackedFactors
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.digest import digest_sums, digests
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.zero3.partition import Partitioner, local_shard, stored_bytes, whole_shape


@dataclass(kw_only=True)
class Materialized:
    """Results of the walk beside the parameters themselves.

    Attributes
    ----------
    report
        The measurements of the walk.
    initial
        This rank's shards of the factors before training (A_0 and B_0), by parameter name; CPU.
    experts
        Number of experts that share a factor, by parameter name, if there are several.
    parameters
        Names, as they were before PEFT's layers were injected, of the weights that PEFT adapts without their module
        (``target_parameters``), by the parameter name of a factor.
    encoded_from
        This rank's shards of the factors that the residual was encoded from, by parameter name; CPU. There is an entry
        only if the residual was encoded from factors, and these differ from A_0 and B_0. If several experts share a
        factor, the entry may hold A_0 and B_0 for some of them.
    layout
        The parametrization of the adapter.
    """

    report: InitializationReport
    initial: dict[str, Tensor]
    experts: dict[str, int]
    parameters: dict[str, str]
    encoded_from: dict[str, Tensor]
    layout: FactorLayout


def materialize(
    backbone: PreTrainedModel,
    plan: Plan,
    reader: CheckpointReader,
    partitioner: Partitioner,
    decomposed: Iterable[DecomposedMatrix],
    *,
    residual: ResidualFormat,
    compute_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    fp32_norms: bool = False,
    layout: FactorLayout | None = None,
    digest: bool = True,
    advance: Callable[[int], object] = lambda _: None,
) -> Materialized:
    """Fill `backbone` (on meta, adapters injected) with ZeRO-3 parameters. Collective: all ranks of the group call it.

    Parameters
    ----------
    backbone
        Model skeleton; changed in place, its parameters are replaced.
    plan
        From `lowrank_dist.model.plan.plan_walk`.
    reader
        Reader of the weights; the parameters that are not adapted are read from it.
    partitioner
        Makes the ZeRO-3 parameters; the factors and other trained tensors are sharded over its `group`, all others over
        its `frozen` group.
    decomposed
        All matrices of the plan, decomposed.
    residual
        Format of the frozen residual.
    compute_dtype
        Dtype of the parameters that are not adapted, and of the arithmetic with the residual.
    factor_dtype
        Dtype of A and B.
    fp32_norms
        Keep the weights of normalisation layers in fp32; their outputs are cast to `compute_dtype`.
    layout
        Which parameters of an update are trained; None: A and B.
    digest
        Whether to take digests of the encoded residuals, for the report. One all-reduce for all of them.
    advance
        Called with the bytes of each tensor after it was loaded (for a progress bar).

    Raises
    ------
    CheckpointError
        On every rank, if any rank finds a NaN or infinity or cannot read.
    """
    started = time.monotonic()
    layout = layout or TrainedFactors()
    filling = _Filling(backbone, partitioner, residual, compute_dtype, factor_dtype, layout)
    sums = []
    for matrix in decomposed:
        if digest:
            storages = residual.of_matrix(matrix.planned.key).storages(matrix.partition)
            sums.append(digest_sums(matrix.residual, storages, partitioner.group.rank).to(partitioner.device))
        filling.matrix(matrix)
        del matrix  # free its memory before the next one is decomposed
    loading = Loading(
        backbone, reader, partitioner, compute_dtype=compute_dtype, factor_dtype=factor_dtype, advance=advance
    )
    loading.parameters(plan.parameters, fp32_norms=fp32_norms)
    loading.buffers(plan.buffers)
    start_magnitudes(backbone, plan, partitioner, factor_dtype, layout)
    report = filling.report
    for of_matrix, text in zip(report.matrices, digests(sums, partitioner.group), strict=False):
        of_matrix.digest = text
    order = {planned.name: index for index, planned in enumerate(plan.matrices)}
    report.matrices.sort(key=lambda matrix: order[matrix.name])
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenWeight)]
    report.residual_bytes_per_rank = stored_bytes(p for module in frozen for p in module.stored())
    totals = torch.tensor(
        [reader.bytes_read, report.residual_bytes_per_rank], dtype=torch.float64, device=partitioner.device
    )
    report.bytes_read, report.residual_bytes = map(int, partitioner.group.sum(totals).tolist())
    report.checkpoint_bytes = reader.nbytes
    report.world_size = partitioner.group.size
    report.seconds = time.monotonic() - started
    return Materialized(
        report=report,
        initial=filling.initial,
        experts=filling.experts,
        parameters=filling.parameter_names,
        encoded_from=filling.encoded_from,
        layout=layout,
    )


class _Filling:
    """A model whose encoded weights are being filled, and the results collected so far."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        partitioner: Partitioner,
        residual: ResidualFormat,
        compute_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        layout: FactorLayout,
    ) -> None:
        self.backbone, self.partitioner = backbone, partitioner
        self.group: ShardGroup = partitioner.group
        self.shared: ShardGroup = partitioner.frozen
        self.residual, self.compute_dtype, self.factor_dtype = residual, compute_dtype, factor_dtype
        self.layout = layout
        self.report = InitializationReport()
        self.initial: dict[str, Tensor] = {}
        self.experts: dict[str, int] = {}
        self.parameter_names: dict[str, str] = {}
        self.encoded_from: dict[str, Tensor] = {}
        self._stacks: dict[str, _Stack] = {}

    def matrix(self, matrix: DecomposedMatrix) -> None:
        """Replace the parameters of an adapted layer by this rank's shards. Collective.

        The experts of one parameter are collected until they are complete; each costs one all-gather per factor.
        """
        matrix = self.within_nodes(matrix)
        planned, residual = matrix.planned, matrix.residual
        stored_as = self.residual.of_matrix(planned.key)
        factors, encoded_from = matrix.factors, matrix.encoded_from
        self.report.matrices.append(matrix.report)
        if planned.expert is not None:
            stack = self._stacks.setdefault(planned.layer, _Stack(planned, self.group, self.factor_dtype))
            if not stack.add(matrix):
                return
            residual, factors, encoded_from = stack.residual(), stack.factors, stack.encoded_from
            del self._stacks[planned.layer]
            self.experts |= dict.fromkeys(planned.factor_names.values(), planned.experts)
        layer: Any = self.backbone.get_submodule(planned.layer)
        frozen = self.frozen(layer, matrix)
        for name, storage in stored_as.storages(matrix.partition).items():
            shape = (storage.shard_numel * self.shared.size * planned.experts,)
            parameter = self.partitioner.parameter(shape, storage.dtype, residual[name], group=self.shared)
            setattr(frozen, name, parameter)
        if planned.wrapped:
            weight = f"{plain_name(planned.layer)}.{planned.parameter}"
            self.parameter_names |= dict.fromkeys(planned.factor_names.values(), weight)
        # PEFT's layer keeps its place around a module; one around a parameter is replaced
        replaced = planned.layer if planned.wrapped or planned.rank == 0 else f"{planned.layer}.base_layer"
        parent, _, child = replaced.rpartition(".")
        setattr(self.backbone.get_submodule(parent), child, frozen)
        for factor, name in planned.factor_names.items():
            self.factor(name, factors[factor], trained=factor in self.layout.trained)
            if encoded_from:
                padded = torch.zeros_like(self.initial[name])
                padded[: encoded_from[factor].numel()] = encoded_from[factor]
                self.encoded_from[name] = padded
        if planned.rank > 0:
            self.further(layer, planned)

    def within_nodes(self, matrix: DecomposedMatrix) -> DecomposedMatrix:
        """Reshard the residual to its shard group, unless that is the world. Collective: one all-to-all of its bytes.

        The walk itself always runs over all ranks, so the bits do not depend on the sharding.
        """
        if self.shared.size == self.group.size:
            return matrix
        residual = self.residual.of_matrix(matrix.planned.key)
        partition = matrix.planned.row_partition(self.shared.size, block=residual.block)
        held, wanted = residual.storages(matrix.partition), residual.storages(partition)
        layout = {name: (held[name], wanted[name]) for name in held}
        (shards,) = redistribute([matrix.residual], [layout], self.group.size, self.group, kept_by=self.shared.size)
        return replace(matrix, partition=partition, residual=shards)

    def frozen(self, layer: Any, matrix: DecomposedMatrix) -> FrozenWeight:
        """The module that holds the encoded residual."""
        planned, partition = matrix.planned, matrix.partition
        residual = self.residual.of_matrix(planned.key)
        if planned.wrapped:
            return AdaptedParameter(
                partition,
                residual,
                compute_dtype=self.compute_dtype,
                wrapper=layer,
                adapter=ADAPTER,
                parameter=planned.parameter,
                experts=None if planned.expert is None else planned.experts,
                input_first=planned.input_first,
                name=f"{plain_name(planned.layer)}.{planned.parameter}",
            )
        if planned.lookup:
            return FrozenEmbedding(
                partition, residual, compute_dtype=self.compute_dtype, replaced=layer.get_base_layer()
            )
        linear = FrozenLinear(partition, residual, compute_dtype=self.compute_dtype, input_first=planned.input_first)
        replaced = layer if planned.rank == 0 else layer.base_layer
        linear.bias = replaced.bias  # still on meta; loaded with the other parameters
        return linear

    def factor(self, name: str, shard: Tensor, *, trained: bool) -> None:
        """Make a parameter of this rank's `shard` of a factor, and keep a copy of its initial value."""
        owner, _, leaf = name.rpartition(".")
        module, whole = self.backbone.get_submodule(owner), self.backbone.get_parameter(name)
        parameter = self.partitioner.parameter(
            whole_shape(whole), self.factor_dtype, shard.to(self.factor_dtype), requires_grad=trained
        )
        setattr(module, leaf, parameter)
        self.initial[name] = local_shard(parameter).detach().to("cpu", copy=True)

    def further(self, layer: Any, planned: PlannedMatrix) -> None:
        """Add the layout's further parameters beside B; their values do not depend on the number of ranks."""
        parameters = {}
        for name, value in self.layout.initial(planned).items():
            mine = slice(*FlatPartition(numel=value.numel(), world_size=self.group.size).bounds(self.group.rank))
            shard = value.flatten()[mine].to(self.partitioner.device, self.factor_dtype)
            shape = tuple(value.shape)
            parameters[name] = self.partitioner.parameter(shape, self.factor_dtype, shard, requires_grad=True)
        if parameters:
            layer.lora_B[ADAPTER] = ExtendedLinear(self.layout, layer.lora_B[ADAPTER].weight, parameters)


class _Stack:
    """Collects this rank's shards of all experts of one parameter into one tensor per factor and storage."""

    def __init__(self, planned: PlannedMatrix, group: ShardGroup, dtype: torch.dtype) -> None:
        self.experts = planned.experts
        self._factors = StackedFactors(planned.factor_shapes, planned.experts, group, dtype)
        self._encoded_from: StackedFactors | None = None  # None while all residuals are encoded from the factors
        self._residuals: dict[int, dict[str, Tensor]] = {}

    def add(self, matrix: DecomposedMatrix) -> bool:
        """Add one expert; return whether it was the last. Collective: one all-gather per factor."""
        expert = matrix.planned.expert
        assert expert is not None
        self._residuals[expert] = matrix.residual
        if matrix.encoded_from and self._encoded_from is None:
            self._encoded_from = self._factors.copy()
        self._factors.put(expert, matrix.factors)
        if self._encoded_from is not None:
            self._encoded_from.put(expert, matrix.encoded_from or matrix.factors)
        return len(self._residuals) == self.experts

    @property
    def factors(self) -> dict[str, Tensor]:
        """Flat shards of the factors of all experts."""
        return self._factors.shards

    @property
    def encoded_from(self) -> dict[str, Tensor]:
        """Flat shards of the factors that residuals were encoded from; empty if those are `factors` for all experts."""
        return {} if self._encoded_from is None else self._encoded_from.shards

    def residual(self) -> dict[str, Tensor]:
        """This rank's shards of the residuals of all experts, concatenated in order, by storage name."""
        ordered = [self._residuals[expert] for expert in range(self.experts)]
        return {name: torch.cat([shards[name] for shards in ordered]) for name in ordered[0]}
