"""The walk: a model skeleton on meta and a checkpoint on disk in, a sharded trainable model out.

Every rank reads its own rows of every adapted weight, decomposes them together with the others, encodes its rows of
the residual and keeps them as its own ZeRO-3 partition. No weight crosses the network, no rank holds a whole matrix,
and the ranks together read every byte once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_dist.checkpoint_io import CheckpointError, CheckpointReader, read_ahead
from lowrank_dist.comm import ShardGroup
from lowrank_dist.layers import FrozenLinear
from lowrank_dist.linalg import seed_from_name
from lowrank_dist.methods.base import Decomposition, Matrix, Method
from lowrank_dist.partition import FlatPartition, RowPartition
from lowrank_dist.residual import ResidualFormat
from lowrank_dist.skeleton import ADAPTER, Plan, PlannedMatrix, PlannedTensor
from lowrank_dist.zero3 import Partitioner, local_shard, stored_bytes


@dataclass(kw_only=True)
class MatrixReport:
    """What the walk measured on one matrix (norms are Frobenius norms of the whole matrix).

    Attributes
    ----------
    name : str
        Layer in the model.
    rows, columns, rank : int
        Shape as stored, and r.
    norm : float
        ``||W||``.
    error : float
        ``||W - (Q(W_res) + scaling B A)||``: what the model differs from W by at step 0.
    quantization_error : float
        ``||W - Q(W)||``: what plain quantization would lose; 0 for residuals that are not quantized.
    error_reduction : float
        ``1 - error / quantization_error``; 0 where nothing is quantized.
    seconds : float
        Wall-clock time of this matrix on this rank, waiting for the disk included.
    """

    name: str
    rows: int
    columns: int
    rank: int
    norm: float
    error: float
    quantization_error: float
    seconds: float = 0.0

    @property
    def error_reduction(self) -> float:
        return 1 - self.error / self.quantization_error if self.quantization_error else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived figures, for JSON."""
        return {**asdict(self), "error_reduction": self.error_reduction}


@dataclass(kw_only=True)
class InitReport:
    """What the walk measured.

    Attributes
    ----------
    matrices
        One entry per adapted matrix.
    bytes_read
        Bytes of tensor data read by all ranks together.
    checkpoint_bytes
        Bytes of all tensors of the checkpoint.
    residual_bytes_per_rank
        Bytes of the encoded residual that this rank stores, padding included.
    residual_bytes
        The same over all ranks.
    world_size
        Ranks that share the model.
    seconds
        Wall-clock time of the walk on this rank.
    """

    matrices: list[MatrixReport] = field(default_factory=list)
    bytes_read: int = 0
    checkpoint_bytes: int = 0
    residual_bytes_per_rank: int = 0
    residual_bytes: int = 0
    world_size: int = 1
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "matrices": [matrix.as_dict() for matrix in self.matrices]}


@dataclass(kw_only=True)
class Materialized:
    """A sharded model: what the walk leaves behind beside the parameters themselves.

    Attributes
    ----------
    report
        Measurements.
    initial
        This rank's shards of the factors before training (A0 and B0), by parameter name; CPU.
    """

    report: InitReport
    initial: dict[str, Tensor]


def materialize(
    backbone: PreTrainedModel,
    plan: Plan,
    reader: CheckpointReader,
    partitioner: Partitioner,
    *,
    init: Method,
    residual: ResidualFormat,
    compute_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    fp32_norms: bool = False,
    progress: bool = True,
) -> Materialized:
    """Fill `backbone` (on meta, adapters injected) with ZeRO-3 parameters. Collective: all ranks of the group call it.

    Parameters
    ----------
    backbone
        Model skeleton; its parameters are replaced.
    plan
        From `lowrank_dist.skeleton.plan_walk`.
    reader
        The checkpoint; read by rows, each byte by one rank.
    partitioner
        Makes the ZeRO-3 parameters; its group shares every tensor.
    init
        Initialisation of the adapters.
    residual
        Format of the frozen residual.
    compute_dtype
        Dtype of the parameters that are not adapted, and of the arithmetic with the residual.
    factor_dtype
        Dtype of A and B.
    fp32_norms
        Keep the weights of normalisation layers in fp32; their outputs are cast to `compute_dtype`.
    progress
        Show a bar (bytes, matrices, ETA) on rank 0.

    Raises
    ------
    CheckpointError
        On every rank, if any rank finds a NaN or infinity or cannot read.
    """
    walk = _Walk(backbone, reader, partitioner, compute_dtype, factor_dtype, progress)
    started = time.monotonic()
    with walk.bar:
        walk.matrices(plan.matrices, init, residual)
        walk.parameters(plan.parameters, fp32_norms)
        walk.buffers(plan.buffers)
    report = walk.report
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenLinear)]
    report.residual_bytes_per_rank = stored_bytes(p for module in frozen for p in module.stored())
    totals = torch.tensor(
        [reader.bytes_read, report.residual_bytes_per_rank], dtype=torch.float64, device=partitioner.device
    )
    report.bytes_read, report.residual_bytes = map(int, partitioner.group.sum(totals).tolist())
    report.checkpoint_bytes = reader.nbytes
    report.world_size = partitioner.group.size
    report.seconds = time.monotonic() - started
    return Materialized(report=report, initial=walk.initial)


class _Walk:
    """State of one walk: where shards go, what was measured."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        reader: CheckpointReader,
        partitioner: Partitioner,
        compute_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        progress: bool,
    ) -> None:
        self.backbone, self.reader, self.partitioner = backbone, reader, partitioner
        self.group: ShardGroup = partitioner.group
        self.compute_dtype, self.factor_dtype = compute_dtype, factor_dtype
        self.report = InitReport()
        self.initial: dict[str, Tensor] = {}
        self.bar = tqdm(
            total=reader.nbytes,
            unit="B",
            unit_scale=True,
            desc="Decomposing",
            disable=not (progress and self.group.rank == 0),
        )

    # -- adapted weights ----------------------------------------------------------------------------------------

    def matrices(self, planned: list[PlannedMatrix], init: Method, residual: ResidualFormat) -> None:
        """Decompose all adapted weights, while a thread reads ahead: at most two more row blocks on the host."""
        partitions = [
            RowPartition(rows=p.rows, columns=p.columns, world_size=self.group.size, block=residual.block)
            for p in planned
        ]
        blocks = read_ahead(self.read_rows, [(p.key, part) for p, part in zip(planned, partitions, strict=True)])
        for matrix, partition in zip(planned, partitions, strict=True):
            started = time.monotonic()
            with self.group.shared_errors():
                block = next(blocks).to(self.partitioner.device)
            self.matrix(matrix, partition, block, init, residual)
            self.report.matrices[-1].seconds = time.monotonic() - started

    def read_rows(self, request: tuple[str, RowPartition]) -> Tensor:
        """This rank's rows of a tensor as fp32 on the host, checked for NaN and infinity."""
        key, partition = request
        start, stop = partition.bounds(self.group.rank)
        rows = self.reader.rows(key, start, stop).float()
        check_finite(key, rows, start)
        return rows

    def matrix(
        self, planned: PlannedMatrix, partition: RowPartition, block: Tensor, init: Method, residual: ResidualFormat
    ) -> None:
        """Decompose, encode and partition one adapted weight."""
        matrix = Matrix(
            name=planned.key,
            block=block,
            partition=partition,
            group=self.group,
            rank=planned.rank,
            scaling=planned.scaling,
            input_first=planned.input_first,
            factor_dtype=self.factor_dtype,
        )
        decomposition = init.decompose(matrix, residual)
        self.replace_base_layer(planned, partition, residual, decomposition)
        self.place_factors(planned, partition, decomposition)
        norm, error, plain = self.norms(matrix, residual, decomposition)
        self.report.matrices.append(
            MatrixReport(
                name=planned.layer,
                rows=planned.rows,
                columns=planned.columns,
                rank=planned.rank,
                norm=norm,
                error=error,
                quantization_error=plain,
            )
        )
        self.bar.set_postfix(matrices=len(self.report.matrices), refresh=False)
        self.bar.update(self.reader.info(planned.key).nbytes)

    def replace_base_layer(
        self, planned: PlannedMatrix, partition: RowPartition, residual: ResidualFormat, decomposition: Decomposition
    ) -> None:
        layer: Any = self.backbone.get_submodule(planned.layer)
        frozen = FrozenLinear(partition, residual, compute_dtype=self.compute_dtype, input_first=planned.input_first)
        for name, storage in residual.storages(partition).items():
            shard = decomposition.residual.shards[name]
            shape = (storage.shard_numel * self.group.size,)
            setattr(frozen, name, self.partitioner.parameter(shape, storage.dtype, shard))
        frozen.bias = layer.base_layer.bias  # on meta until its own turn
        layer.base_layer = frozen

    def place_factors(self, planned: PlannedMatrix, partition: RowPartition, decomposition: Decomposition) -> None:
        layer: Any = self.backbone.get_submodule(planned.layer)
        left, right = decomposition.factors.left, decomposition.factors.right
        # Without padding, a rank's rows of B are its flat partition of B: nothing needs to be gathered.
        rows_are_shard = not planned.input_first and partition.padded_rows == partition.rows
        if not rows_are_shard:
            left = self.whole_left(left, partition)
        a, b = (left.mT, right.mT) if planned.input_first else (right, left)
        for child, factor in (("lora_A", a), ("lora_B", b)):
            name = f"{planned.layer}.{child}.{ADAPTER}.weight"
            shape = getattr(layer, child)[ADAPTER].weight.shape
            shard = factor.flatten()
            if not (rows_are_shard and factor is b):
                flat = FlatPartition(numel=shape.numel(), world_size=self.group.size)
                shard = shard[slice(*flat.bounds(self.group.rank))]
            parameter = self.partitioner.parameter(
                shape, self.factor_dtype, shard.to(self.factor_dtype), requires_grad=True
            )
            getattr(layer, child)[ADAPTER].weight = parameter
            self.initial[name] = local_shard(parameter).detach().to("cpu", copy=True)

    def whole_left(self, left: Tensor, partition: RowPartition) -> Tensor:
        """Rows of all ranks of a row-sharded factor: ``[m, r]``, replicated. One all-gather."""
        padded = left.new_zeros(partition.rows_per_rank, left.shape[1])
        padded[: left.shape[0]] = left
        return self.group.gather_equal(padded)[: partition.rows]

    def norms(
        self, matrix: Matrix, residual: ResidualFormat, decomposition: Decomposition
    ) -> tuple[float, float, float]:
        """``||W||``, ``||W - (Q(W_res) + scaling B A)||`` and ``||W - Q(W)||``, Frobenius. One all-reduce."""
        factors = decomposition.factors
        error = torch.addmm(
            matrix.block - decomposition.residual.decoded, factors.left, factors.right, alpha=-matrix.scaling
        )
        squares = [matrix.block.double().square().sum(), error.double().square().sum()]
        if residual.exact:
            squares.append(torch.zeros_like(squares[0]))
        else:
            plain = residual.encode(matrix.block, matrix.partition, matrix.group)
            squares.append((matrix.block - plain.decoded).double().square().sum())
        norm, error_norm, plain_norm = self.group.sum(torch.stack(squares)).sqrt().tolist()
        return norm, error_norm, plain_norm

    # -- everything else ----------------------------------------------------------------------------------------

    def parameters(self, planned: list[PlannedTensor], fp32_norms: bool) -> None:
        """Load the parameters that are not adapted into their partitions, a flat range per rank."""
        norms = norm_modules(self.backbone) if fp32_norms and self.compute_dtype != torch.float32 else {}
        with self.group.shared_errors():
            for tensor in planned:
                owner, _, leaf = tensor.names[0].rpartition(".")
                parameter = getattr(self.backbone.get_submodule(owner), leaf)
                dtype = torch.float32 if owner in norms else self.compute_dtype
                if tensor.trainable:
                    dtype = self.factor_dtype
                partitioned = self.partitioner.parameter(
                    parameter.shape, dtype, self.flat_shard(tensor, parameter, dtype), requires_grad=tensor.trainable
                )
                for name in tensor.names:
                    owner, _, leaf = name.rpartition(".")
                    setattr(self.backbone.get_submodule(owner), leaf, partitioned)
        for module in norms.values():
            compute_in_fp32(module, self.compute_dtype)

    def flat_shard(self, tensor: PlannedTensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        partition = FlatPartition(numel=parameter.numel(), world_size=self.group.size)
        start, stop = partition.bounds(self.group.rank)
        if tensor.key is None:
            return self.fresh(tensor.names[0], parameter).flatten()[start:stop].to(self.partitioner.device, dtype)
        shard = self.reader.flat(tensor.key, start, stop)
        check_finite(tensor.key, shard, start)
        self.bar.update(self.reader.info(tensor.key).nbytes)
        return shard.to(self.partitioner.device, dtype)

    def fresh(self, name: str, parameter: Tensor) -> Tensor:
        """Transformers' initialisation of a linear layer that the checkpoint lacks; the same on every rank."""
        if name.endswith(".bias"):
            return torch.zeros(parameter.shape)
        generator = torch.Generator().manual_seed(seed_from_name(name))
        std = getattr(self.backbone.config, "initializer_range", 0.02)
        return torch.randn(parameter.shape, generator=generator) * std

    def buffers(self, planned: list[PlannedTensor]) -> None:
        """Load persistent buffers: read by rank 0, replicated."""
        for tensor in planned:
            (name,), key = tensor.names, tensor.key
            buffer = self.backbone.get_buffer(name)
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.partitioner.device)

            def read(key: str = str(key), value: Tensor = value) -> Tensor:
                whole = self.reader.flat(key, 0, value.numel()).view(value.shape)
                self.bar.update(whole.nbytes)
                return whole.to(value)

            buffer.data = self.group.once(value, read)


def check_finite(key: str, values: Tensor, start: int) -> None:
    """Raise CheckpointError if `values` (rows or elements of tensor `key` from `start` on) hold a NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        bad[0] += start
        raise CheckpointError(
            f"{key}: NaN or infinity at {bad}; the checkpoint is damaged or was saved from a diverged run"
        )


def norm_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers by name: modules whose class name contains "Norm"."""
    return {name: module for name, module in backbone.named_modules() if "Norm" in type(module).__name__}


def compute_in_fp32(module: nn.Module, output_dtype: torch.dtype) -> None:
    """Let `module` take its input in fp32 and give its output in `output_dtype`."""
    cast: Callable[..., Any] = lambda _, args: (args[0].float(), *args[1:])  # noqa: E731
    module.register_forward_pre_hook(cast)
    module.register_forward_hook(lambda _, args, output: output.to(output_dtype))
