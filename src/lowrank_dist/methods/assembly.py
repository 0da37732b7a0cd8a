"""Steps that most initialisations share; a new one adds little more than its own formula."""

from __future__ import annotations

from torch import Tensor

from lowrank_dist.linalg import SVD
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, residual_block
from lowrank_dist.quantization.format import ResidualFormat


def layer_shape(matrix: Matrix) -> tuple[int, int]:
    """``(in, out)`` of the layer, whether its weight is stored ``[out, in]`` or ``[in, out]``.

    Parameters
    ----------
    matrix
        The matrix of the layer.

    Returns
    -------
    tuple of int
        Number of inputs and number of outputs.

    See Also
    --------
    Matrix : Its `input_first` says how the weight is stored.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, layer_shape
    >>> matrix = Matrix(
    ...     name="h.0.attn.c_attn.weight",
    ...     block=torch.ones(4, 12),
    ...     partition=RowPartition(rows=4, columns=12, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=2,
    ...     scaling=1.0,
    ...     input_first=True,
    ...     factor_dtype=torch.float32,
    ... )
    >>> layer_shape(matrix)
    (4, 12)
    """
    rows, columns = matrix.partition.rows, matrix.partition.columns
    return (rows, columns) if matrix.input_first else (columns, rows)


def sharded(matrix: Matrix, a: Tensor, b: Tensor) -> Factors:
    """Cut this rank's part out of replicated factors.

    Parameters
    ----------
    matrix
        The matrix that the factors belong to.
    a
        A, ``[r, in]`` fp32, replicated.
    b
        B, ``[out, r]`` fp32, replicated.

    Returns
    -------
    Factors
        ``left`` row-sharded like ``matrix.block``, ``right`` replicated, both on its device. Nothing is communicated.

    See Also
    --------
    unchanged : Encodes W as it is, beside such factors.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix, sharded
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
    >>> factors = sharded(matrix, torch.ones(2, 4), torch.zeros(6, 2))
    >>> factors.left.shape, factors.right.shape
    (torch.Size([6, 2]), torch.Size([2, 4]))
    """
    left, right = (a.mT, b.mT) if matrix.input_first else (b, a)
    start, stop = matrix.partition.bounds(matrix.group.rank)
    device = matrix.block.device
    return Factors(left=left[start:stop].to(device), right=right.to(device))


def subtracted(matrix: Matrix, factors: Factors, residual: ResidualFormat, *, svd: SVD | None = None) -> Decomposition:
    """Round the factors to ``matrix.factor_dtype`` and encode ``W - scaling * left @ right``.

    The difference overwrites W if ``matrix.spare`` allows it. Only the residual format communicates.

    Parameters
    ----------
    matrix
        W, row-sharded.
    factors
        ``left`` ``[m_p, r]`` fp32, row-sharded like W; ``right`` ``[r, n]`` fp32, replicated.
    residual
        The format to encode in.
    svd
        The singular value decomposition that the factors come from, for the report.

    Returns
    -------
    Decomposition
        The rounded factors and the encoded residual.

    See Also
    --------
    unchanged : For methods that start at zero.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Factors, Matrix, subtracted
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.ones(6, 4),
    ...     partition=RowPartition(rows=6, columns=4, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=1,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> factors = Factors(left=torch.ones(6, 1), right=torch.ones(1, 4))
    >>> found = subtracted(matrix, factors, Dense(dtype=torch.float32))
    >>> found.residual.rows(slice(0, 1))
    tensor([[0., 0., 0., 0.]])
    """
    factors = factors.rounded(matrix.factor_dtype)
    rest = residual_block(matrix, factors, out=matrix.block if matrix.spare else None)
    return _encoded(matrix, factors, residual, rest, svd)


def unchanged(matrix: Matrix, factors: Factors, residual: ResidualFormat, *, svd: SVD | None = None) -> Decomposition:
    """Round the factors to ``matrix.factor_dtype`` and encode W as it is; at step 0 the factors add nothing to it.

    Only the residual format communicates.

    Parameters
    ----------
    matrix
        W, row-sharded.
    factors
        ``left`` ``[m_p, r]`` fp32, row-sharded like W; ``right`` ``[r, n]`` fp32, replicated.
    residual
        The format to encode in.
    svd
        The singular value decomposition that the factors come from, for the report.

    Returns
    -------
    Decomposition
        The rounded factors and the encoded W.

    See Also
    --------
    subtracted : For methods whose residual is ``W - scaling * B A``.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Factors, Matrix, unchanged
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.ones(6, 4),
    ...     partition=RowPartition(rows=6, columns=4, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=1,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> factors = Factors(left=torch.zeros(6, 1), right=torch.ones(1, 4))
    >>> found = unchanged(matrix, factors, Dense(dtype=torch.float32))
    >>> found.residual.rows(slice(0, 1))
    tensor([[1., 1., 1., 1.]])
    """
    return _encoded(matrix, factors.rounded(matrix.factor_dtype), residual, matrix.block, svd)


def _encoded(
    matrix: Matrix, factors: Factors, residual: ResidualFormat, rest: Tensor, svd: SVD | None
) -> Decomposition:
    encoded = residual.encode(rest, matrix.partition, matrix.group)
    return Decomposition(factors=factors, residual=encoded, svd=svd, encoded_of=rest)
