"""What an initialisation is: a frozen dataclass that turns one row-sharded matrix into factors and a residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.linalg import SVD, minus_product, slabs
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.quantization.format import Encoded, ResidualFormat
from lowrank_dist.storage.buffers import Buffers

if TYPE_CHECKING:  # it imports peft and transformers
    from lowrank_dist.model.plan import PlannedMatrix


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One row-sharded matrix on its way through the walk, with what its adapter asks for.

    The matrix is taken as it is stored: ``[out, in]`` for ``nn.Linear``, ``[in, out]`` for GPT-2's ``Conv1D`` and for
    embeddings, whose inputs are the one-hot vectors of their ids.

    Attributes
    ----------
    name
        Name of the weight in the checkpoint; seeds everything random.
    block
        This rank's real rows, ``[m_p, n]`` fp32.
    spare
        Whether `decompose` may overwrite `block` (`Decomposition.encoded_of` then tells what W is not asked for).
    partition
        Shape and sharding of the whole matrix.
    group
        The ranks that share it.
    rank
        r of the adapter.
    scaling
        PEFT's factor in front of B A: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
    input_first
        True where rows are inputs (Conv1D, embeddings).
    lookup
        True where the layer looks rows up instead of multiplying by the matrix (embeddings).
    factor_dtype
        Type of the trained factors. Factors are rounded to it before the residual is formed, so that residual and
        factors still add up to the weight.
    statistic
        What a calibration pass measured for this matrix, where the method's `statistic` asks for it; fp32, row-sharded.
        ``"covariance"``: this rank's rows of ``X^T X / tokens``, ``[in, in]`` in all, cut like a `RowPartition` with
        ``block=1``. ``"gradient"``: this rank's rows of ``dL/dW``, shaped and sharded like `block`.
    thorough
        Whether to estimate what the decomposition left over, for the report.
    factor_names
        Names of the parameters that hold A (``lora_A``) and B (``lora_B``) in the model.
    expert
        Which of how many matrices, where these share the parameters (experts).
    buffers
        Memory for matrices like `block` that are given up soon.
    """

    name: str
    block: Tensor
    partition: RowPartition
    group: ShardGroup
    rank: int
    scaling: float
    input_first: bool
    factor_dtype: torch.dtype
    spare: bool = False
    lookup: bool = False
    statistic: Tensor | None = None
    thorough: bool = False
    factor_names: Mapping[str, str] = field(default_factory=dict)
    expert: tuple[int, int] = (0, 1)
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def of(
        cls,
        planned: PlannedMatrix,
        block: Tensor,
        group: ShardGroup,
        *,
        partition: RowPartition,
        factor_dtype: torch.dtype,
        spare: bool = False,
        statistic: Tensor | None = None,
        thorough: bool = False,
        buffers: Buffers | None = None,
    ) -> Matrix:
        """The matrix of a plan, of which this rank holds the rows `block`; nothing is copied or communicated.

        Parameters
        ----------
        planned
            Which; says all that the other parameters, which are those of `Matrix`, do not.
        block
            ``[m_p, n]`` fp32, row-sharded over `group` as `partition` says.
        """
        return cls(
            name=planned.key,
            block=block,
            spare=spare,
            partition=partition,
            group=group,
            rank=planned.rank,
            scaling=planned.scaling,
            input_first=planned.input_first,
            lookup=planned.lookup,
            factor_dtype=factor_dtype,
            statistic=statistic,
            thorough=thorough,
            factor_names=planned.factor_names,
            expert=(planned.expert or 0, planned.experts),
            buffers=Buffers() if buffers is None else buffers,
        )

    def empty(self) -> Tensor:
        """An uninitialized matrix like `block`, ``[m_p, n]`` fp32."""
        return self.buffers.empty(self.block.shape, self.block.device)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """``scaling * left @ right``: the low-rank part of a matrix in its stored orientation.

    Attributes
    ----------
    left
        ``[m_p, r]`` fp32 holding `factor_dtype` values, row-sharded. B, or A^T where rows are inputs.
    right
        ``[r, n]`` fp32 holding `factor_dtype` values, replicated. A, or B^T where rows are inputs.
    """

    left: Tensor
    right: Tensor

    def rounded(self, dtype: torch.dtype) -> Factors:
        return Factors(left=self.left.to(dtype).float(), right=self.right.to(dtype).float())


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A decomposed matrix: trainable factors and the encoded residual.

    Attributes
    ----------
    factors
        ``B A``.
    residual
        The encoded residual.
    ended_on : {"quantize", "decompose"}
        Which came last: "quantize" if the residual was encoded for these factors, "decompose" if the factors were
        fitted to the encoded residual.
    svd
        The singular value decomposition that the factors come from, where there was one.
    encoded_of
        What `residual` encodes, ``[m_p, n]`` fp32, row-sharded, where at step 0 the model lacks no more of W than what
        encoding loses: W is not asked for any more, and may be overwritten. None: W is as it was.
    encoded_from
        The residual is the encoded ``W - scaling * left @ right`` of these, holding `factor_dtype` values; zero for W
        itself. None: of `factors`, or of W where the method starts at zero. With them a residual can be formed again
        from W, without a decomposition (`lowrank_dist.decomposition.restore`).
    """

    factors: Factors
    residual: Encoded
    ended_on: Literal["quantize", "decompose"] = "quantize"
    svd: SVD | None = None
    encoded_of: Tensor | None = None
    encoded_from: Factors | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a decomposition costs, for the planner; estimates to leading order.

    Attributes
    ----------
    sharded_flops
        Of all ranks together: work that they share.
    replicated_flops
        Of every rank: work that each does for itself, or waits for.
    collectives
        How many all-reduces (or the like) one waits for.
    reduced_bytes
        Bytes of the tensors that these reduce.
    """

    sharded_flops: float = 0.0
    replicated_flops: float = 0.0
    collectives: int = 0
    reduced_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of the initialisations. Subclasses add their options as fields and implement `decompose`.

    Attributes
    ----------
    statistic : {None, "covariance", "gradient"}
        What `decompose` wants to find in ``Matrix.statistic``: None, the second moment of the layer's inputs, or the
        gradient of the loss, both from a calibration pass.
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = None

    @property
    def starts_at_zero(self) -> bool:
        """Whether the residual is W itself: the adapter starts at zero, or next to it, and is an ordinary LoRA."""
        return False

    @property
    def layout(self) -> FactorLayout:
        """What of the update is trained, and what stands for it in files."""
        return TrainedFactors()

    def work(self, rows: int, columns: int, rank: int) -> Work:
        """What `decompose` costs on a ``rows x columns`` matrix; the default knows of ``W - scaling B A`` only."""
        return Work(sharded_flops=2.0 * rows * columns * rank, collectives=1)

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        """Why a matrix of this shape cannot be decomposed with this rank, or None; asked before anything is read."""
        return None

    def check(self, residual: ResidualFormat) -> None:  # noqa: B027 (most methods take any residual)
        """Raise InputError where the options make no sense with this residual format."""

    @abstractmethod
    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        """Decompose one matrix. Called by all ranks of ``matrix.group`` together, in the same order."""

    def __str__(self) -> str:
        return type(self).__name__


def residual_block(matrix: Matrix, factors: Factors, *, out: Tensor | None = None) -> Tensor:
    """This rank's rows of ``W - scaling * left @ right``, ``[m_p, n]`` fp32; see `lowrank_dist.linalg.minus_product`.

    The same bits whatever the number of ranks, so that a residual can be formed again on another one. Written to `out`,
    which may be W itself, or to memory of its own.
    """
    start, _ = matrix.partition.bounds(matrix.group.rank)
    return minus_product(
        matrix.block,
        factors.left,
        factors.right,
        scaling=matrix.scaling,
        rows=matrix.partition.rows,
        start=start,
        out=matrix.empty() if out is None else out,
    )


def quantization_error(matrix: Matrix, encoded: Encoded) -> Tensor:
    """This rank's rows of ``W - Q``, ``[m_p, n]`` fp32, for an encoded residual Q; no memory for Q itself."""
    error = matrix.empty()
    for rows in slabs(error):
        torch.sub(matrix.block[rows], encoded.rows(rows), out=error[rows])
    return error
