"""No adapter: a weight that is only encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_dist.methods.assembly import unchanged
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, Method
from lowrank_dist.quantization.format import ResidualFormat

if TYPE_CHECKING:
    from lowrank_dist.model.plan import PlannedMatrix


@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """W is encoded as it is, and has no factors: the base of adapters that are not made from the weights.

    The walk takes it for every matrix of rank 0, whatever method the others have.

    Parameters
    ----------
    adapter
        Name of the adapter that the base is for; the name of the method in messages and manifests.

    See Also
    --------
    LoRA : Leaves W as it is too, and has factors.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import Matrix
    >>> from lowrank_dist.methods.frozen import Frozen
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(6, 4),
    ...     partition=RowPartition(rows=6, columns=4, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=0,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> found = Frozen().decompose(matrix, Dense(dtype=torch.float32))
    >>> torch.equal(found.residual.rows(slice(None)), matrix.block)
    True
    """

    adapter: str = "Frozen"

    @property
    def starts_at_zero(self) -> bool:
        return True

    @property
    def looks_at_weights(self) -> bool:
        return False

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        rows, columns = matrix.block.shape
        none = Factors(left=matrix.block.new_empty(rows, 0), right=matrix.block.new_empty(0, columns))
        return unchanged(matrix, none, residual)

    def __str__(self) -> str:
        return self.adapter


def method_for(planned: PlannedMatrix, init: Method) -> Method:
    """The method for a matrix of a walk with `init`: that method, or `Frozen` if the matrix has no adapter."""
    return init if planned.rank > 0 else Frozen()
