"""A training job as far as its cost is concerned: a model of which only shapes are known, and the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from lowrank_dist.decomposition.walk import check_matrices
from lowrank_dist.distributed.partition import FlatPartition, Storage
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.methods.base import Method
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.model.plan import Plan, PlannedMatrix, PlannedTensor, open_plan
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.source import ShapesOnly, SourceReader

ShardWithin = Literal["world", "node"]


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """A model and what its adapter makes of it; nothing of it has memory.

    Attributes
    ----------
    backbone
        On the meta device, adapters injected.
    plan
        Adapted matrices and other parameters.
    checkpoint_bytes, frozen_bytes
        Of what it starts from, all of it; of its parameters that are neither adapted nor trained.
    """

    backbone: PreTrainedModel
    plan: Plan
    checkpoint_bytes: int
    frozen_bytes: int

    @classmethod
    def of(
        cls, source: Path, adapter: LoraConfig | None, *, init: Method | None = None, untie: bool = False
    ) -> ModelShapes:
        """Shapes of a checkpoint directory, of one without weights, or of the file of a model's configuration.

        Parameters
        ----------
        adapter
            PEFT's configuration; None: every parameter is trained.
        init
            Its objections to matrices are raised.
        untie
            Give a tied head a weight of its own.

        Raises
        ------
        ModelError
            As the set-up of a run would.
        """
        backbone = build_skeleton(source)
        try:
            reader = CheckpointReader(source)
        except CheckpointError:
            if any(source.glob("*.safetensors")):
                raise
            reader = SourceReader(ShapesOnly(backbone))
        plan = open_plan(reader, adapter, backbone=backbone, untie=untie).plan
        if init is not None:
            check_matrices(plan, init)
        shapes = cls.planned(backbone, plan, reader)
        reader.close()
        return shapes

    @classmethod
    def planned(
        cls, backbone: PreTrainedModel, plan: Plan, reader: CheckpointReader, *, nbytes: int | None = None
    ) -> ModelShapes:
        """Shapes of a model that is filled from `reader` as `plan` says; `nbytes`: with the adapter beside it."""
        frozen = (tensor.key for tensor in plan.parameters if not tensor.trainable and tensor.key is not None)
        return cls(
            backbone=backbone,
            plan=plan,
            checkpoint_bytes=reader.nbytes if nbytes is None else nbytes,
            frozen_bytes=sum(reader.info(key).nbytes for key in frozen),
        )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run is, beside its shapes.

    Attributes
    ----------
    nodes, gpus_per_node
        Ranks are their product.
    batch_size, length, accumulate
        Sequences of a rank's batch, their longest length, batches of a step.
    compute_dtype, factor_dtype
        Of frozen parameters and arithmetic; of trained parameters.
    init
        How matrices are decomposed; None where they are read decomposed, or every parameter is trained.
    residual
        How the frozen part of a matrix is stored; None where every parameter is trained.
    starts_at_zero
        Of a residual model: whether its residual is the original.
    fills_cache
        Whether the residual model is written to disk first, and read from there.
    stage
        Of ZeRO; 0: replicas (DDP).
    gradient_checkpointing, live_layers, fp32_norms, shard_within
        As `PiSSAStrategy` has them.
    optimizer, fused_cross_entropy
        As `CausalLMModule` has them.
    offload_optimizer, offload_parameters
        Whether optimizer state and partitions are in host memory.
    bucket
        Elements of gradients that are reduced at a time; None: as the strategy chooses.
    steps
        Optimizer steps of the run, where that is known.
    on_gpu
        Whether it is to run on GPUs, to which the assumed rates apply.
    """

    nodes: int
    gpus_per_node: int
    batch_size: int = 1
    length: int = 512
    accumulate: int = 1
    compute_dtype: torch.dtype = torch.bfloat16
    factor_dtype: torch.dtype = torch.bfloat16
    init: Method | None = None
    residual: ResidualFormat | None = None
    starts_at_zero: bool = False
    fills_cache: bool = False
    stage: int = 3
    gradient_checkpointing: bool = True
    live_layers: int = 2
    fp32_norms: bool = False
    shard_within: ShardWithin = "world"
    optimizer: str = "adamw"
    fused_cross_entropy: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int | None = None
    steps: int | None = None
    on_gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "batch_size", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"plan: {name}={getattr(self, name)} must be at least 1")

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained; else every parameter is."""
        return self.residual is not None

    @property
    def layout(self) -> FactorLayout:
        """What of an update is trained."""
        return TrainedFactors() if self.init is None else self.init.layout

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    @property
    def shard_ranks(self) -> int:
        """Ranks that together hold the frozen parameters once."""
        return self.gpus_per_node if self.shard_within == "node" else self.ranks

    @property
    def tokens(self) -> int:
        """Of a rank's batch, at most."""
        return self.batch_size * self.length

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.batch_size * self.ranks * self.accumulate


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the sharded model.

    Attributes
    ----------
    kind
        ``codes``, ``maxima``, ``dense``, ``other``, ``trained``.
    name
        In the backbone; the layer, for storages of a residual.
    shard_numel, ranks
        Elements of a rank, padding included, and the ranks that share it.
    dtype
        Of an element.
    """

    kind: str
    name: str
    shard_numel: int
    ranks: int
    dtype: torch.dtype

    @property
    def shard_bytes(self) -> int:
        """On one rank."""
        return self.shard_numel * self.dtype.itemsize

    @property
    def gathered_bytes(self) -> int:
        """Whole, with padding."""
        return self.shard_bytes * self.ranks


def parameters(shapes: ModelShapes, job: RunSpec) -> Iterator[Parameter]:
    """Every parameter of the model as `lowrank_dist.initialization.materialize` makes it, with padding."""
    frozen_ranks = job.shard_ranks if job.stage == 3 else 1
    trained_ranks = job.ranks if job.stage == 3 else 1
    for planned in shapes.plan.matrices:
        if planned.expert not in (None, 0):  # experts share their parameters
            continue
        yield from _of_residual(planned, job, frozen_ranks)
        factors = {name: shapes.backbone.get_parameter(name).numel() for name in planned.factor_names.values()}
        kinds = {n: "trained" if f in job.layout.trained else "other" for f, n in planned.factor_names.items()}
        for name, shape in job.layout.parameter_shapes(planned).items():
            factors[name], kinds[name] = math.prod(shape), "trained"
        for name, numel in factors.items():
            shard = FlatPartition(numel=numel, world_size=trained_ranks).shard_numel
            yield Parameter(kind=kinds[name], name=name, shard_numel=shard, ranks=trained_ranks, dtype=job.factor_dtype)
    for tensor in shapes.plan.parameters:
        yield _other(shapes, tensor, job, trained_ranks if tensor.trainable else frozen_ranks)


def _of_residual(planned: PlannedMatrix, job: RunSpec, ranks: int) -> Iterator[Parameter]:
    assert job.residual is not None
    kinds = {"weight_packed": "codes", "weight_absmax": "maxima", "weight_nested": "maxima"}
    storages: dict[str, Storage] = dict(job.residual.storages(planned.row_partition(ranks, block=job.residual.block)))
    for name, storage in storages.items():
        yield Parameter(
            kind=kinds.get(name, "dense"),
            name=planned.layer,
            shard_numel=storage.shard_numel * planned.experts,
            ranks=ranks,
            dtype=storage.dtype,
        )


def _other(shapes: ModelShapes, tensor: PlannedTensor, job: RunSpec, ranks: int) -> Parameter:
    owner, _, leaf = tensor.names[0].rpartition(".")
    module = shapes.backbone.get_submodule(owner)
    dtype = job.compute_dtype
    if tensor.trainable:
        dtype = job.factor_dtype
    elif job.fp32_norms and "Norm" in type(module).__name__:
        dtype = torch.float32
    return Parameter(
        kind="trained" if tensor.trainable else "other",
        name=tensor.names[0],
        shard_numel=FlatPartition(numel=getattr(module, leaf).numel(), world_size=ranks).shard_numel,
        ranks=ranks,
        dtype=dtype,
    )
