"""Steps that most initialisations end with; a new one is little more than its own formula beside these."""

from __future__ import annotations

from torch import Tensor

from lowrank_dist.linalg import SVD
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, residual_block
from lowrank_dist.quantization.format import ResidualFormat


def layer_shape(matrix: Matrix) -> tuple[int, int]:
    """``(in, out)`` of the layer, whichever way its weight is stored."""
    rows, columns = matrix.partition.rows, matrix.partition.columns
    return (rows, columns) if matrix.input_first else (columns, rows)


def sharded(matrix: Matrix, a: Tensor, b: Tensor) -> Factors:
    """This rank's part of replicated factors.

    Parameters
    ----------
    matrix
        The matrix they belong to.
    a
        A, ``[r, in]`` fp32, replicated.
    b
        B, ``[out, r]`` fp32, replicated.

    Returns
    -------
    Factors
        ``left`` row-sharded like ``matrix.block``, ``right`` replicated. Nothing is communicated.
    """
    left, right = (a.mT, b.mT) if matrix.input_first else (b, a)
    start, stop = matrix.partition.bounds(matrix.group.rank)
    device = matrix.block.device
    return Factors(left=left[start:stop].to(device), right=right.to(device))


def subtracted(matrix: Matrix, factors: Factors, residual: ResidualFormat, *, svd: SVD | None = None) -> Decomposition:
    """Round the factors to ``matrix.factor_dtype`` and encode ``W - scaling * left @ right``.

    It takes the place of W where that may be overwritten. Communicates only what the residual format does. `svd` is
    where the factors come from.
    """
    factors = factors.rounded(matrix.factor_dtype)
    rest = residual_block(matrix, factors, out=matrix.block if matrix.spare else None)
    return _encoded(matrix, factors, residual, rest, svd)


def unchanged(matrix: Matrix, factors: Factors, residual: ResidualFormat, *, svd: SVD | None = None) -> Decomposition:
    """Round the factors to ``matrix.factor_dtype`` and encode W as it is: at step 0 they add nothing to it.

    Communicates only what the residual format does. `svd` is where the factors come from.
    """
    return _encoded(matrix, factors.rounded(matrix.factor_dtype), residual, matrix.block, svd)


def _encoded(
    matrix: Matrix, factors: Factors, residual: ResidualFormat, rest: Tensor, svd: SVD | None
) -> Decomposition:
    encoded = residual.encode(rest, matrix.partition, matrix.group)
    return Decomposition(factors=factors, residual=encoded, svd=svd, encoded_of=rest)
