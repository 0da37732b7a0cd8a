"""The interface of an initialisation: a frozen dataclass that turns a row-sharded matrix into factors and residual."""

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
    """One row-sharded matrix of the walk, with the rank and scaling of its adapter.

    The matrix keeps its stored orientation: ``[out, in]`` for ``nn.Linear``, ``[in, out]`` for GPT-2's ``Conv1D`` and
    for embeddings, whose inputs are the one-hot vectors of their ids.

    Attributes
    ----------
    name
        Name of the weight in the pretrained weights; everything random is seeded with it.
    block
        This rank's rows without padding, ``[m_p, n]`` fp32.
    spare
        Whether `decompose` may overwrite `block`. W may then be gone, and `Decomposition.encoded_of` replaces it.
    partition
        Shape and sharding of the whole matrix.
    group
        The ranks that share the matrix.
    rank
        Rank r of the adapter.
    scaling
        The number that PEFT multiplies B A by: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
    input_first
        Whether rows are inputs (Conv1D, embeddings).
    lookup
        Whether the layer looks rows up instead of multiplying by the matrix (embeddings).
    factor_dtype
        Dtype of the factors. They are rounded to it before the residual is formed, so that residual and factors still
        add up to the weight.
    statistic
        What the calibration pass measured for this matrix, if the method's `statistic` asks for it; fp32, row-sharded.
        ``"covariance"``: this rank's rows of the ``[in, in]`` matrix ``X^T X / tokens``, cut like a `RowPartition` with
        ``block=1``. ``"gradient"``: this rank's rows of ``dL/dW``, shaped and sharded like `block`.
    thorough
        Whether to estimate the excess residual of the decomposition, for the report.
    factor_names
        Names of the parameters that hold A (``lora_A``) and B (``lora_B``) in the model.
    expert
        Index of the expert and number of experts that share the parameters; ``(0, 1)`` for any other matrix.
    buffers
        Memory for short-lived matrices of the shape of `block`.

    See Also
    --------
    Method : Decomposes it.
    Decomposition : The result.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.ones(6, 4),
    ...     partition=RowPartition(rows=6, columns=4, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=2,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> matrix.partition.bounds(matrix.group.rank)
    (0, 6)
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
        """Make the matrix of a plan from this rank's rows; nothing is copied or communicated.

        Parameters
        ----------
        planned
            The planned matrix, which gives every field that is not a parameter here.
        block
            This rank's rows, ``[m_p, n]`` fp32, row-sharded over `group` according to `partition`.
        group, partition, factor_dtype, spare, statistic, thorough, buffers
            Fields of `Matrix`.
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
        """Return an uninitialized matrix of the shape and device of `block`, ``[m_p, n]`` fp32."""
        return self.buffers.empty(self.block.shape, self.block.device)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The two factors of a matrix in its stored orientation; its low-rank part is ``scaling * left @ right``.

    Attributes
    ----------
    left
        ``[m_p, r]`` fp32 holding `factor_dtype` values, row-sharded. B, or A^T where rows are inputs.
    right
        ``[r, n]`` fp32 holding `factor_dtype` values, replicated. A, or B^T where rows are inputs.

    See Also
    --------
    sharded : Makes them from replicated A and B.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.methods import Factors
    >>> factors = Factors(left=torch.ones(6, 2), right=torch.ones(2, 4))
    >>> (factors.left @ factors.right).shape
    torch.Size([6, 4])
    """

    left: Tensor
    right: Tensor

    def rounded(self, dtype: torch.dtype) -> Factors:
        """Return the factors rounded to `dtype`, again in fp32."""
        return Factors(left=self.left.to(dtype).float(), right=self.right.to(dtype).float())


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A decomposed matrix: trainable factors and the encoded residual.

    Attributes
    ----------
    factors
        A and B.
    residual
        The encoded residual.
    ended_on : {"quantize", "decompose"}
        The last step: "quantize" if the residual was encoded for these factors, "decompose" if the factors were fitted
        to the encoded residual.
    svd
        The singular value decomposition that the factors come from, if there was one.
    encoded_of
        The values that `residual` encodes, ``[m_p, n]`` fp32, row-sharded. It replaces W, which may be gone: at step 0
        the model differs from W by ``encoded_of - residual`` alone. None if W is untouched and the error must be
        measured against it.
    encoded_from
        The factors that the residual was encoded from, as ``W - scaling * left @ right``, holding `factor_dtype`
        values; zero if W itself was encoded. None if these are `factors`, or if W was encoded because the method starts
        at zero. They suffice to form the residual from W again without a decomposition
        (`lowrank_dist.decomposition.restore`).

    See Also
    --------
    Method.decompose : Returns it.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, PiSSA
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(6, 4),
    ...     partition=RowPartition(rows=6, columns=4, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=2,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> from lowrank_dist.quantization import Dense
    >>> weight = matrix.block.clone()
    >>> found = PiSSA().decompose(matrix, Dense(dtype=torch.float32))
    >>> sum_of_parts = found.residual.rows(slice(None)) + found.factors.left @ found.factors.right
    >>> torch.allclose(sum_of_parts, weight, atol=1e-5)
    True
    """

    factors: Factors
    residual: Encoded
    ended_on: Literal["quantize", "decompose"] = "quantize"
    svd: SVD | None = None
    encoded_of: Tensor | None = None
    encoded_from: Factors | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """Cost of a decomposition, for the schedule; estimates to leading order.

    Attributes
    ----------
    sharded_flops
        Flops that the ranks share, of all ranks together.
    replicated_flops
        Flops that every rank does for itself, or waits for.
    collectives
        Number of collectives that a rank waits for, counted as all-reduces.
    reduced_bytes
        Bytes of the tensors that these collectives reduce.
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
        What `decompose` reads from ``Matrix.statistic``: nothing, the second moment of the layer's inputs, or the
        gradient of the loss. The calibration pass measures the latter two.

    See Also
    --------
    register : Gives a method a name.
    subtracted, unchanged : What `decompose` usually ends with.

    Examples
    --------
    A method whose factors are the first r rows of W, for weights stored ``[out, in]`` on one rank:

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from lowrank_dist.methods import Decomposition, Factors, Matrix, Method, subtracted
    >>> @dataclass(frozen=True, kw_only=True)
    ... class FirstRows(Method):
    ...     def decompose(self, matrix: Matrix, residual) -> Decomposition:
    ...         right = matrix.block[: matrix.rank].clone()
    ...         left = torch.eye(matrix.partition.rows, matrix.rank) / matrix.scaling
    ...         return subtracted(matrix, Factors(left=left, right=right), residual)
    >>> str(FirstRows())
    'FirstRows'
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = None

    @property
    def starts_at_zero(self) -> bool:
        """Whether the residual is W itself, so that the adapter is an ordinary LoRA.

        It starts at or near zero, but for `lowrank_dist.LoRAOne`, which starts with a step.
        """
        return False

    @property
    def looks_at_weights(self) -> bool:
        """Whether A and B depend on W, which must then be read and decoded even if it stays as it is stored."""
        return True

    @property
    def layout(self) -> FactorLayout:
        """Which parameters of the update are trained, and how files store them."""
        return TrainedFactors()

    def work(self, rows: int, columns: int, rank: int) -> Work:
        """Cost of `decompose` on a ``rows x columns`` matrix; the default counts ``W - scaling B A`` only."""
        return Work(sharded_flops=2.0 * rows * columns * rank, collectives=1)

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        """Return why a matrix of this shape cannot be decomposed with this rank, or None; called before any read."""
        return None

    def check(self, residual: ResidualFormat) -> None:  # noqa: B027 (most methods take any residual)
        """Raise InputError if the options contradict the residual format."""

    @abstractmethod
    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        """Decompose one matrix. Called by all ranks of ``matrix.group`` together, in the same order."""

    def __str__(self) -> str:
        return type(self).__name__


def residual_block(matrix: Matrix, factors: Factors, *, out: Tensor | None = None) -> Tensor:
    """This rank's rows of ``W - scaling * left @ right``, ``[m_p, n]`` fp32; see `lowrank_dist.linalg.minus_product`.

    The bits do not depend on the number of ranks, so that a residual can be formed again on another number. The result
    is written to `out`, which may be W itself; None allocates it. Nothing is communicated.
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
    """This rank's rows of ``W - Q``, ``[m_p, n]`` fp32, for an encoded residual Q, which is decoded slab by slab."""
    error = matrix.empty()
    for rows in slabs(error):
        torch.sub(matrix.block[rows], encoded.rows(rows), out=error[rows])
    return error
