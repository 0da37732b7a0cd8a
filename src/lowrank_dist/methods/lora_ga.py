"""LoRA-GA: the adapter's first step follows that of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.linalg import seed_from_name
from lowrank_dist.methods.assembly import layer_shape, subtracted
from lowrank_dist.methods.base import Decomposition, Factors, Matrix
from lowrank_dist.methods.calibrated import CalibratedMethod
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class LoRAGA(CalibratedMethod):
    """Low-rank adaptation with gradient approximation: A and B from different singular triplets of the gradient of W.

    With ``G = dL/dW = U S V^T`` (2r leading triplets), ``A = V_a^T`` and ``B = f U_b S_b``; `direction` picks the
    triplets a and b, `scale` the factor f. The residual is ``W - scaling * B A``. At step 0 the model computes W, or
    ``Q(W_res) + scaling * B A`` if the residual is quantized. Options, names and arithmetic are those of PEFT's
    ``LoraGAConfig``, whose B carries ``S_b``; the B of the paper does not.

    The signs of singular vectors are arbitrary. A and B take different triplets, so that the signs of the terms of B A
    are arbitrary too; the stored orientation of W fixes them (see `SVD`).

    Parameters
    ----------
    direction : {"ArBr", "A2rBr", "ArB2r", "random"}
        Which triplets, counted from 0, A and B take. "ArBr": A the odd ones, B the even ones. "A2rBr": A the second r,
        B the first r. "ArB2r": A the first r, B the second r. "random": both the same r of the 2r, drawn with a seed
        from the weight's name and `seed`.
    scale : {"stable", "weight_svd", "gd_scale", "unit"}
        "stable": ``f = out^(1/4) / sqrt(stable_gamma)``. "weight_svd": f makes the first singular value of B that of W.
        "gd_scale": A and B are divided by `scaling`. "unit": f = 1.
    stable_gamma
        The number gamma of ``scale="stable"``.
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`; the default oversampling is 2r.

    See Also
    --------
    CorDA, EVA : The other methods that need a calibration pass.
    lowrank_dist.Calibration : The data that the gradient is measured on.

    Notes
    -----
    The collectives are those of `randomized_svd` for 2r triplets of G and, with ``scale="weight_svd"``, for r triplets
    of W.

    References
    ----------
    S. Wang, L. Yu, J. Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, section 3 and
    algorithm 1; arXiv:2407.05000.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import LoRAGA, Matrix
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(64, 32),
    ...     partition=RowPartition(rows=64, columns=32, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=4,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ...     statistic=torch.randn(64, 32),
    ... )
    >>> found = LoRAGA().decompose(matrix, Dense(dtype=torch.float32))
    >>> found.factors.left.shape, found.factors.right.shape
    (torch.Size([64, 4]), torch.Size([4, 32]))
    """

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "gradient"

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stable_gamma > 0:
            raise InputError(f"{self}: stable_gamma={self.stable_gamma} must be positive")

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        if 2 * rank > min(rows, columns):
            return (
                f"{self} takes 2r={2 * rank} singular triplets of the gradient, which has min(out, in)="
                f"{min(rows, columns)}; lower r or drop it from target_modules"
            )
        return super().objection(rows=rows, columns=columns, rank=rank, lookup=lookup, wrapped=wrapped)

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        svd = self.leading(matrix, self.measured(matrix), 2 * matrix.rank, rows=matrix.partition.rows)
        for_a, for_b = self.triplets(matrix)
        magnitude_a, magnitude_b = self.magnitudes(matrix, svd.s[for_b])
        if matrix.input_first:  # the stored gradient is the transpose: u and vh change places
            left, right = svd.u[:, for_a] * magnitude_a, magnitude_b[:, None] * svd.vh[for_b]
        else:
            left, right = svd.u[:, for_b] * magnitude_b, magnitude_a * svd.vh[for_a]
        return subtracted(matrix, Factors(left=left, right=right), residual)

    def triplets(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Indices of the triplets, of 2r, that A and B take: two tensors ``[r]`` int64, the same on every rank."""
        r, device = matrix.rank, matrix.block.device
        order = torch.arange(2 * r)
        if self.direction == "random":
            generator = torch.Generator().manual_seed(seed_from_name(matrix.name, self.seed))
            drawn = torch.randperm(2 * r, generator=generator)[:r].to(device)
            return drawn, drawn
        picked = {"ArBr": (order[1::2], order[::2]), "A2rBr": (order[r:], order[:r]), "ArB2r": (order[:r], order[r:])}
        for_a, for_b = picked[self.direction]
        return for_a.to(device), for_b.to(device)

    def magnitudes(self, matrix: Matrix, singular_values: Tensor) -> tuple[float, Tensor]:
        """Return what multiplies the rows of A (one number) and the columns of B (``[r]`` fp32, replicated)."""
        if self.scale == "stable":
            return 1.0, singular_values * (layer_shape(matrix)[1] ** 0.25 / self.stable_gamma**0.5)
        if self.scale == "gd_scale":
            return 1 / matrix.scaling, singular_values / matrix.scaling
        if self.scale == "weight_svd":
            largest = self.leading(matrix, matrix.block, matrix.rank, rows=matrix.partition.rows).s[0]
            # PEFT scales by B's first column, which is not its largest with direction="random"
            first = singular_values[0]
            return 1.0, singular_values * torch.where(first > 0, largest / first, 1)
        return 1.0, singular_values
