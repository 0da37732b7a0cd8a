"""The nuclear norm of a row-sharded matrix: exact for a small short side, else estimated.

References
----------
S. Ubaru, J. Chen, Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl.
38 (2017), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import full_fp32
from lowrank_dist.linalg.trailing import own_rows, short_gram

EXACT_SIDE = 768  # up to this short side, computing all singular values is cheaper than the estimate
_PROBES, _STEPS = 16, 24


def nuclear_norm(block: Tensor, *, rows: int, group: ShardGroup, seed: int) -> float:
    """Compute the sum of the singular values of a row-sharded matrix.

    Parameters
    ----------
    block
        This rank's rows, ``[m_p, n]`` fp32; zero rows are allowed.
    rows
        m, the rows of all ranks together.
    group
        The ranks that hold the rows.
    seed
        Seed of the probes; the same on every rank.

    Returns
    -------
    float
        The norm, replicated. It is exact to ``1e-7 sigma_1 min(m, n)`` if the short side is at most 768, by one reduce
        of its fp64 Gram matrix. Otherwise it is the estimate of stochastic Lanczos quadrature with 16 probes of 24
        steps, by ``2 * 16 * 24 * 2 m_p n`` flops and 24 all-reduces of ``16 x n`` (and smaller ones). Its standard
        error was 0.4 to 1.4 % on matrices with sides of at least 1024, Gaussian and with spectra i^-0.5. The standard
        error of the reduction of a quantization error, with the same probes for both norms, was 0.4 to 1.3 percentage
        points.
    """
    short = min(rows, block.shape[1])
    if short <= EXACT_SIDE:
        total = torch.empty(1, dtype=torch.float64, device=block.device)
        gram = short_gram(block, rows, group)
        group.reduce_once(gram, total, lambda whole: torch.linalg.eigvalsh(whole).clamp_min(0).sqrt().sum()[None])
        return float(total)
    return _quadrature(block, rows, group, seed)


def _quadrature(block: Tensor, rows: int, group: ShardGroup, seed: int) -> float:
    """Stochastic Lanczos quadrature of ``tr((W^T W)^(1/2))``, or ``tr((W W^T)^(1/2))`` if rows are the short side."""
    tall, short = rows >= block.shape[1], min(rows, block.shape[1])
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randint(0, 2, (_PROBES, short), generator=generator).float() * 2 - 1
    if not tall:  # vectors of the short side are sharded, hence their inner products are partial sums
        first, stop = own_rows(block, group)
        probes = probes[:, first:stop]
    basis = (probes / short**0.5).to(block.device)[:, None]  # [probes, steps, short]

    def operate(x: Tensor) -> Tensor:
        return group.sum(x @ block.mT @ block) if tall else group.sum(x @ block) @ block.mT

    def summed(partial: Tensor) -> Tensor:
        return partial if tall else group.sum(partial)

    diagonal, beside = [], []
    with full_fp32():
        for step in range(_STEPS):
            last = basis[:, -1]
            product = operate(last)
            diagonal.append(summed((product * last).sum(dim=1)))
            for _ in range(2):  # full reorthogonalization, so that the quadrature counts no eigenvalue twice
                overlap = summed(torch.einsum("psn,pn->ps", basis, product))
                product = product - torch.einsum("psn,ps->pn", basis, overlap)
            length = summed(product.square().sum(dim=1)).sqrt()
            if step + 1 == _STEPS or not bool((length > 1e-6 * diagonal[0]).all()):
                break
            beside.append(length)
            basis = torch.cat([basis, (product / length[:, None])[:, None]], dim=1)
    steps = len(diagonal)
    small = torch.zeros(_PROBES, steps, steps, dtype=torch.float64)
    small.diagonal(dim1=1, dim2=2).copy_(torch.stack(diagonal, dim=1))
    if steps > 1:
        small.diagonal(offset=1, dim1=1, dim2=2).copy_(torch.stack(beside, dim=1))
        small.diagonal(offset=-1, dim1=1, dim2=2).copy_(torch.stack(beside, dim=1))
    values, vectors = torch.linalg.eigh(small)
    per_probe = short * (vectors[:, 0].square() * values.clamp_min(0).sqrt()).sum(dim=1)
    return float(per_probe.mean())
