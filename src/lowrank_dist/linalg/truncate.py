"""Optimal truncation of a low-rank update to a lower rank, from its factors alone.

With thin QR factorisations ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the update is ::

    s B A = Q_B (s R_B R_A^T) Q_A^T.

Its singular values are those of the small matrix in the middle. Its singular vectors are those of that matrix,
multiplied by ``Q_B`` and ``Q_A``. The leading K triplets give the nearest matrix of rank K, in the Frobenius, the
spectral and every other unitarily invariant norm (C. Eckart, G. Young, 1936; L. Mirsky, 1960). The truncation loses the
tail: ``||s B A - B' A'||_F^2 = sum_{i > K} sigma_i^2``. The update itself, ``out x in``, is never formed.

The functions are pure and take CPU tensors. Everything is computed in fp64, because ``B A - B_0 A_0`` of a converted
adapter is a small difference of much larger products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The nearest update of rank at most `rank`, and the spectrum before truncation.

    Attributes
    ----------
    a, b
        ``[rank, in]`` and ``[out, rank]`` fp64. The singular values are split evenly: row i of `a` and column i of `b`
        have the norm ``sqrt(sigma_i)``. Rows and columns beyond the rank of the update are zero.
    singular_values
        All ``min(r, in, out)`` singular values of the update, descending, fp64.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor


@dataclass(frozen=True, kw_only=True)
class EnergyKept:
    """Share of the energy (the sum of squared singular values) that a truncation keeps of several updates.

    Attributes
    ----------
    overall
        Share kept of all updates together.
    matrices
        Share kept of every update, by name. A zero update loses nothing and counts as 1.
    """

    overall: float
    matrices: dict[str, float]

    @property
    def least_of(self) -> str:
        """Name of the update that loses the largest share."""
        return min(self.matrices, key=lambda name: self.matrices[name])

    @property
    def least(self) -> float:
        """Share kept of the update `least_of`."""
        return self.matrices[self.least_of]


def truncate(a: Tensor, b: Tensor, rank: int, *, scaling: float = 1.0) -> Truncated:
    """Compute the nearest matrix of rank at most `rank` to ``scaling * b @ a``, as a product of two factors.

    Parameters
    ----------
    a, b
        ``[r, in]`` and ``[out, r]``, any floating dtype. r may exceed `in` and `out`.
    rank
        At least 1. Beyond the rank of the update the factors are padded with zeros.
    scaling
        Multiplies the update and is absorbed into the new factors.

    Notes
    -----
    Memory: two fp64 copies of both factors. Work: ``O((in + out) r^2 + r^3)``.
    """
    q_a, r_a = torch.linalg.qr(a.double().mT)
    q_b, r_b = torch.linalg.qr(b.double())
    u, values, vh = torch.linalg.svd(scaling * r_b @ r_a.mT, full_matrices=False)
    roots = values[:rank].sqrt()
    small_a, small_b = a.new_zeros(rank, a.shape[1], dtype=torch.float64), b.new_zeros(b.shape[0], rank).double()
    small_a[: len(roots)] = (roots[:, None] * vh[:rank]) @ q_a.mT
    small_b[:, : len(roots)] = q_b @ (u[:, :rank] * roots)
    return Truncated(a=small_a, b=small_b, singular_values=values)


def singular_values(a: Tensor, b: Tensor, *, scaling: float = 1.0) -> Tensor:
    """All ``min(r, in, out)`` singular values of ``scaling * b @ a``, descending, fp64; shapes as for `truncate`."""
    _, r_a = torch.linalg.qr(a.double().mT, mode="r")
    _, r_b = torch.linalg.qr(b.double(), mode="r")
    values: Tensor = torch.linalg.svdvals(scaling * r_b @ r_a.mT)
    return values


def energy_kept(spectra: Mapping[str, Tensor], rank: int) -> EnergyKept:
    """Share of energy that truncation to `rank` keeps of updates with these singular values (descending), by name."""
    squares = {name: values.double().square() for name, values in spectra.items()}
    kept = {name: float(square[:rank].sum()) for name, square in squares.items()}
    total = {name: float(square.sum()) for name, square in squares.items()}
    return EnergyKept(
        overall=_part(sum(kept.values()), sum(total.values())),
        matrices={name: _part(kept[name], total[name]) for name in squares},
    )


def _part(kept: float, total: float) -> float:
    return kept / total if total else 1.0
