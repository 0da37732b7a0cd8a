"""Products of a row-sharded matrix with a few vectors, divided into pieces that suit a BLAS on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg.precision import has_tf32, slabs, squared_norm, tf32_product

# Rows of W at a time for W x on a CPU. 16 vectors then run at 42 instead of 33 Gflop/s (14336 x 4096, one thread), 32
# vectors at 56 instead of 47.
_SLAB = 512
# Columns of W at a time for W^T y on a CPU. 32 vectors then run at 67 instead of 60 Gflop/s (4096 x 14336); narrower
# matrices gain nothing.
_COLUMNS = 4096
# Elements of W per thread for W^T W x on a CPU: 1 MiB, still in a cache when W^T is applied. 32 vectors on two ranks
# side by side run at 46 instead of 42 Gflop/s (8192 x 8192), or 52 instead of 43 (4096 x 4096).
_CACHED = 2**18


class RowSharded:
    """A row-sharded matrix W, ``m x n``: rank p holds the rows ``W_p [m_p, n]``, fp32, possibly none.

    Sets of b vectors are stored as rows, because thin products then run at nearly the speed of wide ones.

    Parameters
    ----------
    block
        This rank's rows.
    rows
        m, the rows of all ranks together.
    group
        The ranks that hold them.
    tf32
        Whether products may be in tf32 if the device has it.

    Attributes
    ----------
    tall
        Whether columns are the short side.
    short
        ``min(m, n)``.
    tf32
        Whether products are in tf32 from now on.
    """

    def __init__(self, block: Tensor, rows: int, group: ShardGroup, *, tf32: bool = False) -> None:
        self.block, self.group = block, group
        self.tall, self.short = rows >= block.shape[1], min(rows, block.shape[1])
        self.tf32 = tf32 and has_tf32(block.device)
        self._on_cpu = block.device.type == "cpu"

    def rows_of(self, right: Tensor) -> Tensor:
        """Apply W to replicated vectors ``[b, n]``: ``[b, m_p]``, sharded. Nothing is communicated."""
        if self._on_cpu and len(self.block) > _SLAB:
            return torch.cat([self._product(right, slab.mT) for slab in torch.split(self.block, _SLAB)], dim=1)
        return self._product(right, self.block.mT)

    def columns_of(self, left: Tensor) -> Tensor:
        """Apply ``W^T`` to sharded vectors ``[b, m_p]``: ``[b, n]``, replicated. One all-reduce."""
        if self._on_cpu and self.block.shape[1] > _COLUMNS:
            some = [self._product(left, columns) for columns in torch.split(self.block, _COLUMNS, dim=1)]
            return self.group.sum(torch.cat(some, dim=1))
        return self.group.sum(self._product(left, self.block))

    @property
    def goes_there_and_back(self) -> bool:
        """Whether `there_and_back` is the faster way to ``W^T W x``.

        It is on a CPU where columns are the short side: no all-reduce separates the two products.
        """
        return self._on_cpu and self.tall and not self.tf32

    def there_and_back(self, x: Tensor, y: Tensor) -> Tensor:
        """This rank's part of ``W^T y`` for ``y = W x``, ``[b, n]`` fp32; writes `y` and reads W once, slab by slab."""
        back = x.new_zeros(len(x), self.block.shape[1])
        for rows in slabs(self.block, _CACHED * torch.get_num_threads()):
            slab = self.block[rows]
            torch.addmm(back, torch.mm(x, slab.mT, out=y[:, rows]), slab, out=back)
        return back

    def squared_norm(self) -> float:
        """``||W||_F^2``. One all-reduce of a number."""
        return float(self.group.sum(squared_norm(self.block)))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return tf32_product(left, right) if self.tf32 else left @ right
