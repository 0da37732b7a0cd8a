"""A training job for the forecast: the shapes of a model and the settings of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decoding.sizes import shapes_only
from lowrank_dist.decomposition.walk import check_matrices
from lowrank_dist.distributed.partition import FlatPartition, FlatStorage
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.initialization.open import OpenedModel
from lowrank_dist.methods.base import Method
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.model.plan import Plan, PlannedMatrix, PlannedTensor, open_plan
from lowrank_dist.model.skeleton import build_skeleton, linear_layers
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.source import SourceReader
from lowrank_dist.tuners.tuner import TunerPlan
from lowrank_dist.zero3.packs import ALIGNMENT
from lowrank_dist.zero3.partition import repeated_layers

ShardWithin = Literal["rank", "node", "world"]
"""The ranks that hold the frozen parameters once between them."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """A model with injected adapters, without memory for its tensors.

    Attributes
    ----------
    backbone
        Model on the meta device, with injected adapters.
    plan
        Adapted matrices and other parameters.
    checkpoint_bytes
        Bytes of the pretrained or residual model on disk, all tensors.
    frozen_bytes
        Bytes on disk of the parameters that are neither adapted nor trained.
    copied_bytes
        Bytes of the same in a cache; more than on disk if they are decoded.
    tuner
        What a tuner of PEFT makes on top of the model; None if adapters are made from the weights.
    """

    backbone: PreTrainedModel
    plan: Plan
    checkpoint_bytes: int
    frozen_bytes: int
    copied_bytes: int
    tuner: TunerPlan | None = None

    @classmethod
    def of(
        cls,
        source: Path,
        adapter: LoraConfig | None,
        *,
        init: Method | None = None,
        untie: bool = False,
        encode_all: bool = False,
        also: Sequence[str] = (),
        backbone: PreTrainedModel | None = None,
    ) -> ModelShapes:
        """Shapes of a pretrained model.

        Parameters
        ----------
        source
            Directory of the model, with or without weights, or the file of its configuration.
        adapter
            PEFT's configuration; None: every parameter is trained.
        init
            Method whose requirements on matrices are checked. None: no check.
        untie
            Give a tied head a weight of its own.
        encode_all
            Whether linear layers without an adapter are encoded too.
        also
            Patterns of `lowrank_dist.model.skeleton.train_also`.
        backbone
            The model of `source` on the meta device, which gets the adapter. None: it is built.

        Raises
        ------
        ModelError
            Wherever the set-up of a run would raise it.
        """
        backbone = build_skeleton(source) if backbone is None else backbone
        try:
            reader = open_reader(source)
        except CheckpointError:
            if any(source.glob("*.safetensors")):
                raise
            reader = SourceReader(shapes_only(backbone))
        encode = linear_layers(backbone) if encode_all else ()
        plan = open_plan(reader, copy.deepcopy(adapter), backbone=backbone, untie=untie, encode=encode, also=also).plan
        if init is not None:
            check_matrices(plan, init)
        shapes = cls.planned(backbone, plan, reader)
        reader.close()
        return shapes

    @cached_property
    def layers(self) -> list[str]:
        """Names of the repeated layers."""
        names = {id(module): name for name, module in self.backbone.named_modules()}
        return [names[id(layer)] for layer in repeated_layers(self.backbone)]

    @classmethod
    def planned(
        cls, backbone: PreTrainedModel, plan: Plan, reader: CheckpointReader, *, nbytes: int | None = None
    ) -> ModelShapes:
        """Shapes of a model that is filled from `reader` according to `plan`.

        `nbytes` replaces the reader's number of bytes, for instance to include an adapter in other files.
        """
        frozen = [reader.info(t.key) for t in plan.parameters if not t.trainable and t.key is not None]
        return cls(
            backbone=backbone,
            plan=plan,
            checkpoint_bytes=reader.nbytes if nbytes is None else nbytes,
            frozen_bytes=sum(info.nbytes for info in frozen),
            copied_bytes=sum(
                math.prod(i.shape) * DTYPES[i.dtype].itemsize if i.dtype in DTYPES else i.nbytes for i in frozen
            ),
        )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Settings of a run.

    Attributes
    ----------
    nodes, gpus_per_node
        Their product is the number of ranks.
    batch_size, length, accumulate
        Sequences in a rank's batch, tokens of the longest sequence, batches per step.
    item_rows, tokens_per_batch
        Sequences of an item of the data, two for pairs; the option of the data module, if it makes batches of so many
        tokens. They tell what to advise.
    compute_dtype, factor_dtype
        Dtype of frozen parameters and arithmetic; dtype of trained parameters.
    init
        Method that decomposes the matrices. None: a residual model is read, or every parameter is trained.
    residual
        Format of the frozen residuals. None: every parameter is trained.
    starts_at_zero
        For a residual model: whether its residual is the original weight.
    fills_cache
        Whether the residual model is first written to disk and then read from there.
    keeps_encoded
        For a residual model: whether it keeps other factors that its residual was encoded from.
    stage
        ZeRO stage; 0: replicas (DDP).
    gradient_checkpointing, keep_decoded, live_layers, fp32_norms, experts_at_a_time, shard_within
        Options of `PiSSAStrategy`.
    keeps_step_zero
        Whether the values of trained parameters at step 0 are kept, as DPO's reference.
    optimizer, fused_cross_entropy
        Options of `CausalLMModule`. An optimizer given by import path is taken to keep two moments.
    optimizer_rank
        Rank on which ``galore`` or ``apollo`` project the gradients of matrices.
    offload_optimizer, offload_parameters
        Whether optimizer state and partitions are in host memory.
    bucket
        Elements of gradients reduced at a time. None: the strategy's default.
    steps
        Optimizer steps of the run. None: unknown.
    on_gpu
        Whether the run uses GPUs, to which the assumed rates apply.
    """

    nodes: int
    gpus_per_node: int
    batch_size: int = 1
    length: int = 512
    accumulate: int = 1
    item_rows: int = 1
    tokens_per_batch: int | None = None
    compute_dtype: torch.dtype = torch.bfloat16
    factor_dtype: torch.dtype = torch.bfloat16
    init: Method | None = None
    residual: ResidualFormat | None = None
    starts_at_zero: bool = False
    fills_cache: bool = False
    keeps_encoded: bool = False
    stage: int = 3
    gradient_checkpointing: bool = True
    keep_decoded: bool = True
    live_layers: int = 2
    fp32_norms: bool = False
    experts_at_a_time: int | None = None
    shard_within: ShardWithin = "world"
    keeps_step_zero: bool = False
    optimizer: str = "adamw"
    optimizer_rank: int = 128
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
        """Whether adapters are trained. False: every parameter is trained."""
        return self.residual is not None

    @property
    def layout(self) -> FactorLayout:
        """What of an update is trained."""
        return TrainedFactors() if self.init is None else self.init.layout

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def shard_ranks(self) -> int:
        """Size of a shard group, whose ranks together hold the frozen parameters once."""
        return {"rank": 1, "node": self.gpus_per_node, "world": self.ranks}[self.shard_within]

    @property
    def keeps_decoded(self) -> bool:
        """Whether a layer's decoded weights stay from its recomputation to its backward."""
        quantized = self.residual is not None and not self.residual.exact
        return quantized and self.gradient_checkpointing and self.keep_decoded

    @property
    def keeps_trained(self) -> bool:
        """Whether gathered trained parameters stay until the end of a step (`lowrank_dist.zero3.gathering`)."""
        return self.stage == 3 and self.shard_ranks == 1 < self.ranks

    @property
    def tokens(self) -> int:
        """Upper bound of the tokens in a rank's batch."""
        return self.batch_size * self.length

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.batch_size * self.ranks * self.accumulate


def planned_run(opened: OpenedModel, job: RunSpec) -> tuple[ModelShapes, RunSpec]:
    """Shapes of a model whose weights are known, and `job` with the settings that depend on them."""
    source = opened.source
    shapes = ModelShapes.planned(opened.backbone, opened.plan, source.reader, nbytes=source.nbytes)
    return replace(shapes, tuner=opened.tuner_plan), replace(
        job,
        init=source.init,
        residual=source.residual,
        starts_at_zero=source.starts_at_zero,
        fills_cache=source.fills_cache,
        keeps_encoded=isinstance(source, ResidualModel) and source.keeps_encoded,
    )


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the sharded model.

    Attributes
    ----------
    kind
        ``codes``, ``maxima``, ``dense``, ``other``, ``trained``, ``buffers``.
    name
        Name in the backbone; for storages of a residual, the name of the layer.
    shard_numel, ranks
        Elements of a rank's shard, padding included, and the number of ranks that share the parameter.
    dtype
        Dtype of the elements.
    """

    kind: str
    name: str
    shard_numel: int
    ranks: int
    dtype: torch.dtype

    @property
    def shard_bytes(self) -> int:
        """Bytes of one rank's shard."""
        return self.shard_numel * self.dtype.itemsize

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole parameter, padding included."""
        return self.shard_bytes * self.ranks

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the parameter in a gather, in which shards are aligned (`lowrank_dist.zero3.packs`)."""
        return -(-self.shard_bytes // ALIGNMENT) * ALIGNMENT * self.ranks


def parameters(shapes: ModelShapes, job: RunSpec) -> Iterator[Parameter]:
    """Every parameter of the model as `lowrank_dist.initialization.materialize` creates it, with padding."""
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
        if planned.magnitude is not None:
            factors[planned.magnitude] = planned.factor_shapes["lora_B"][0]
            kinds[planned.magnitude] = "trained"
        for name, numel in factors.items():
            shard = FlatPartition(numel=numel, world_size=trained_ranks).shard_numel
            yield Parameter(kind=kinds[name], name=name, shard_numel=shard, ranks=trained_ranks, dtype=job.factor_dtype)
    in_place = () if shapes.tuner is None else shapes.tuner.in_place
    for tensor in shapes.plan.parameters:
        if not set(in_place).intersection(tensor.names):
            yield _other(shapes, tensor, job, trained_ranks if tensor.trainable else frozen_ranks)
    if shapes.tuner is not None:
        for name, shape in shapes.tuner.trained.items():
            shard = FlatPartition(numel=math.prod(shape), world_size=trained_ranks).shard_numel
            yield Parameter(kind="trained", name=name, shard_numel=shard, ranks=trained_ranks, dtype=job.factor_dtype)
        for shape, dtype in shapes.tuner.buffers:
            kept = job.factor_dtype if dtype.is_floating_point else dtype
            yield Parameter(kind="buffers", name="", shard_numel=math.prod(shape), ranks=1, dtype=kept)


def _of_residual(planned: PlannedMatrix, job: RunSpec, ranks: int) -> Iterator[Parameter]:
    assert job.residual is not None
    kinds = {"weight_packed": "codes", "weight_absmax": "maxima", "weight_nested": "maxima", "weight_scales": "maxima"}
    residual = job.residual.of_matrix(planned.key)
    storages: dict[str, FlatStorage] = dict(residual.storages(planned.row_partition(ranks, block=residual.block)))
    for name, storage in storages.items():
        yield Parameter(
            kind=kinds.get(name.partition("[")[0], "dense"),
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
