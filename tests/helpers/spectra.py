"""Matrices of a given spectrum, and what an SVD of them left over."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dist.linalg import SVD


def matrix(rows: int, columns: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with singular values ``i ** -decay``, and these."""
    values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -decay
    return with_spectrum(rows, columns, values, seed), values


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))[0]
    return ((u * values) @ v.mT).float()


def leftover(w: Tensor, svd: SVD) -> Tensor:
    return w.double() - (svd.u.double() * svd.s.double()) @ svd.vh.double()


def excess(w: Tensor, svd: SVD) -> float:
    """``||W - U S V^T||_F / ||W - W_r||_F - 1`` against the exact singular values of the fp32 matrix."""
    tail = torch.linalg.svdvals(w.double())[len(svd.s) :].norm()
    return float(leftover(w, svd).norm() / tail) - 1
