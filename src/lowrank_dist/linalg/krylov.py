"""Randomized block Krylov SVD of a row-sharded matrix: only thin blocks and small square tensors cross the network.

Notation: W is ``m x n``, sharded by rows over P ranks; rank p holds ``W_p`` (``m_p x n``, possibly no row at all);
``s = min(m, n)``, ``l = max(m, n)``. Sets of vectors are stored as rows, because thin products then run at nearly the
speed of wide ones and a growing basis stays contiguous. Everything is computed in true fp32, except that Gram matrices
for orthonormalization are in fp64 and products that span the subspace are in tf32 where the device has it.

References
----------
.. [HMT] N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", SIAM Review 53 (2011);
   arXiv:0909.4061.
.. [MM] C. Musco, C. Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
   decomposition", NeurIPS 2015, algorithm 2; arXiv:1504.05477.
.. [MMM] R. Meyer, C. Musco, C. Musco, "On the unreasonable effectiveness of single vector Krylov methods for low-rank
   approximation", SODA 2024; arXiv:2305.02535.
.. [GU] G. H. Golub, R. Underwood, "The block Lanczos method for computing eigenvalues", Mathematical Software III
   (1977).
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg.excess import estimated_excess
from lowrank_dist.linalg.orthonormal import gram, orthonormal_rows, row_signs
from lowrank_dist.linalg.precision import full_fp32
from lowrank_dist.linalg.products import RowSharded

# A basis of at least this share of the short side costs more than the whole Gram matrix of that side.
_FULL_SHARE = 2 / 3
# With a tolerance, a basis may grow to this multiple of rank + oversampling.
_MAX_GROWTH = 2
# fp32 eigenvectors have an error of some 1e-7 of the largest eigenvalue. It is negligible if the r-th eigenvalue is
# above this share of the largest.
_FLAT = 1e-3
# The least number of rows of the basis between two energies that are compared: increments over fewer vary too much.
_APART = 8
# A new block is orthogonalized against the basis again while rounding may have grown by more than this factor.
_MAX_LOSS = 30.0
_MAX_PASSES = 6
# From this condition number of W^T W on a block on, the product with W and that with W^T are each orthonormalized.
_STEEP = 1e3
# From this condition number of a product in tf32 on, the following products are in fp32.
_STEEP_TF32 = 30.0
# Exponents of a largest entry with which the squares of much smaller ones are still in fp32.
_SQUARED = 30
# Exponent of the largest power of two of which the inverse is no denormal number in fp32.
_LARGEST = 126


class SVD(NamedTuple):
    """Leading singular triplets of a row-sharded matrix.

    Attributes
    ----------
    u
        Left singular vectors, ``[m_p, r]``, fp32, row-sharded.
    s
        Singular values, ``[r]``, fp32, descending, replicated.
    vh
        Right singular vectors, ``[r, n]``, fp32, replicated. The largest entry of every row is positive.
    iterations
        Number of passes ``W^T W``; 0 if the whole Gram matrix of the short side was decomposed instead.
    estimate
        Estimate of the excess residual, ``||W - U S V^T||_F / ||W - W_r||_F - 1``, given a tolerance or on request. It
        is above the tolerance if the largest basis was not enough, and infinite if the basis was too small for an
        estimate. Otherwise NaN, or 0 if nothing was approximated.

    See Also
    --------
    randomized_svd : Computes the leading triplets.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.linalg import randomized_svd
    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> svd = randomized_svd(w, 2, rows=3, group=ShardGroup.single(), seed=0)
    >>> torch.allclose(svd.u * svd.s @ svd.vh, torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-5)
    True
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    iterations: int = 0
    estimate: float = 0.0


def seed_from_name(name: str, salt: int = 0) -> int:
    """Derive a 63-bit seed from a weight's name, so that results do not depend on order or world size.

    Parameters
    ----------
    name
        Name of the weight.
    salt
        Distinguishes several seeds of one weight.

    Returns
    -------
    int
        The first 63 bits of the little-endian SHA-256 digest of ``{salt}:{name}``, shifted down by one.

    See Also
    --------
    randomized_svd : Takes the seed.

    Examples
    --------
    >>> from lowrank_dist.linalg import seed_from_name
    >>> name = "model.layers.0.self_attn.q_proj.weight"
    >>> seed_from_name(name) == seed_from_name(name)
    True
    >>> seed_from_name(name) == seed_from_name(name, salt=1)
    False
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "little") >> 1


def randomized_svd(
    block: Tensor,
    rank: int,
    *,
    rows: int,
    group: ShardGroup,
    seed: int,
    oversampling: int | None = None,
    power_iterations: int = 15,
    tolerance: float | None = None,
    start: Tensor | None = None,
    estimated: bool = False,
) -> SVD:
    """Compute the leading singular triplets of a row-sharded matrix by randomized block Krylov iteration ([MM], 2).

    Block Lanczos with full reorthogonalization ([GU]) builds an orthonormal basis of ``span{G, A G, ..., A^q G}`` with
    ``A = W^T W`` (``W W^T`` and ``W G`` where rows are the short side). The triplets are the best in that basis. With
    q = 0 and columns as the long side this is the range finder of [HMT], algorithm 4.1.

    Parameters
    ----------
    block
        This rank's rows, ``[m_p, n]`` fp32; zero rows are allowed.
    rank
        Number of triplets, at most ``min(m, n)``.
    rows
        m, the rows of all ranks together.
    group
        The ranks that hold the rows.
    seed
        Seed of the Gaussian start block G; the same on every rank (`seed_from_name`).
    oversampling
        Directions of the basis beyond `rank`, dropped at the end. The basis has the dimension
        ``D = rank + oversampling``. Default: ``3 * rank``. Flops and memory are proportional to D.
    power_iterations
        q, the number of passes ``W^T W``. The basis has ``q + 1`` blocks of ``b = D / (q + 1)`` rows (rounded up).
        More passes sharpen the result; each costs one all-reduce and no additional flops.
    tolerance
        Adds blocks of b rows until the estimated excess residual ``||W - U S V^T||_F / ||W - W_r||_F - 1`` is at most
        this value, up to ``2 D`` rows (``rank + 32`` if that is more). It replaces q as the stopping rule.
    start
        ``[n, j]`` replicated guess of the leading right singular vectors. It replaces the first j columns of G, and
        blocks are at least j wide (warm start for a matrix that changed little).
    estimated
        Estimates the excess residual also without a tolerance, which costs an additional reduce of ``D x D`` fp64 and
        three small eigenvalue problems on rank 0.

    Returns
    -------
    SVD
        ``u`` ``[m_p, rank]`` row-sharded, ``s`` ``[rank]`` and ``vh`` ``[rank, n]`` replicated, all fp32; with the
        number of passes and the estimate.

    Raises
    ------
    ValueError
        If `rank` is not in ``1..min(m, n)``.

    See Also
    --------
    lowrank_dist.linalg.trailing.trailing_svd : The smallest singular triplets.
    orthonormalize : Thin QR of a row-sharded matrix.
    seed_from_name : Seed that depends on the weight's name only.

    Notes
    -----
    *Cost per rank.* The products with W take ``2 m_p n b (2 q + 1)`` flops and the basis ``2 D^2 s`` (replicated where
    columns are the short side, else sharded by P). Rank 0 takes about ``10 D^3`` flops for the eigenvectors of the
    projected matrix. The projected matrix itself takes ``2 D^2 l / P`` where the recurrence does not give it (a steep
    spectrum, tf32, a tolerance). If D reaches s (2/3 of s where columns are the short side or the group is a single
    rank), the basis spans the whole space and the result is exact to rounding.

    *Memory* (fp32). A copy of W if its entries are so small or large that their squares leave the range of fp32, and
    ``4 D (n + m_p)`` bytes: for 28672 x 8192 and r = 128 (D = 512), 19 MB on each of 32 ranks, or
    75 MB on a single rank, whose W takes 940 MB. A tolerance doubles this and adds ``8 D^2`` bytes.

    *Collectives.* An all-reduce finds the largest entry. Every pass issues one all-reduce of ``b x n`` fp32. Where rows
    are the short side, it issues another of up to ``D x b`` and the reduce + broadcast of `orthonormalize`; more of
    these where the spectrum is steep. The end issues a reduce of ``b x b``, or ``D x D`` without the recurrence, a
    broadcast of ``D x r``, the collectives of `orthonormalize` for r vectors, and a broadcast of ``2 r + 1`` rows. A
    tolerance adds a reduce of ``D x D`` fp64 and a broadcast of one number every ``rank / 2`` rows, at least every 8.

    *Accuracy.* If ``b >= rank``, the spectral error is at most ``(1 + e) sigma_{r+1}`` for
    ``q = O(log(n) / sqrt(e))``, whatever the gaps between singular values ([MM], theorem 1). Narrower blocks give more
    accuracy for the same flops. The number of passes they need grows with the logarithm of the smallest gap ([MMM],
    theorem 1), and they may miss copies of a singular value whose exact multiplicity is above b. fp32 rounding adds up
    to some ``3e-5 sigma_1`` where the spectrum is steep.

    *tf32.* On CUDA, without a tolerance or an estimate, products with W that span the subspace are in tf32 until a
    block is steep. The triplets are then computed from an fp32 product of W with its r leading directions, which takes
    an additional ``2 m_p n r`` flops.

    *Estimate.* It is not a bound; in the worst known case it is 4.3 times too small (`lowrank_dist.linalg.excess`).

    Examples
    --------
    A 40 x 10 matrix of rank 3 on a single rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.linalg import randomized_svd, seed_from_name
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(40, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    >>> svd = randomized_svd(w, 3, rows=40, group=ShardGroup.single(), seed=seed_from_name("w"))
    >>> svd.u.shape, svd.s.shape, svd.vh.shape
    (torch.Size([40, 3]), torch.Size([3]), torch.Size([3, 10]))
    >>> bool((svd.u * svd.s @ svd.vh - w).norm() < 1e-5 * w.norm())
    True
    """
    columns = block.shape[1]
    if not 0 < rank <= min(rows, columns):
        raise ValueError(f"rank={rank} must lie in 1..min(m, n)={min(rows, columns)} of the {rows} x {columns} matrix")
    dimension = rank + (3 * rank if oversampling is None else oversampling)
    width = math.ceil(dimension / (power_iterations + 1))
    if start is not None:
        width = max(width, start.shape[1])
    exponent = _exponent(block, group)
    if exponent:
        block = block * 2.0**-exponent
    with full_fp32():
        # The estimate comes from differences of energies, which the rounding of tf32 would swamp.
        krylov = _Krylov(RowSharded(block, rows, group, tf32=tolerance is None and not estimated), rank)
        krylov.run(seed, width, power_iterations, tolerance, start)
        if estimated and math.isnan(krylov.estimate):
            krylov.estimate_in_hindsight()
        svd = krylov.triplets()
    return svd._replace(s=svd.s * 2.0**exponent) if exponent else svd


def _exponent(block: Tensor, group: ShardGroup) -> int:
    """Power of two by which W is divided, so that squares of its entries lie within fp32; 0 for most W.

    The division is exact. One all-reduce of a number.
    """
    largest = block.new_zeros(1)
    if block.numel():
        low, high = torch.aminmax(block)
        largest[0] = torch.maximum(-low, high)
    _, exponent = math.frexp(float(group.max(largest)))
    # the power and its inverse are fp32 numbers as well
    return 0 if abs(exponent) <= _SQUARED else max(-_LARGEST, min(_LARGEST, exponent))


class _Krylov:
    """Block Krylov space of ``W^T W`` or ``W W^T``, whichever acts on the short side, and its image under W or W^T.

    Attributes
    ----------
    basis
        ``[D, s]`` orthonormal rows. Replicated if columns are the short side, else sharded.
    image
        ``[D, l]``, W or W^T applied to the basis: sharded if columns are the short side, else replicated.
    gram
        ``[D, D]`` fp64, the lower triangle of this rank's part of ``image @ image.T``; None until it is first needed.
    recurrence
        For every block but the last, replicated: its diagonal block of ``basis A basis^T`` and the off-diagonal block
        that links it to the next one. None where they are not accurate enough in fp32.
    units_are_free
        Whether the image of all unit vectors is available without a product: it is the local W.
    ahead
        This rank's part of ``W^T`` applied to the last block of the image, if it was computed together with the image.
    steep
        Whether ``W^T W``, which squares the spectrum, loses more of it than fp32 holds.
    was_loose
        Whether products with W were in tf32 at first.
    apart
        Rows by which the basis grows between two evaluations of the captured energy.
    """

    def __init__(self, w: RowSharded, rank: int) -> None:
        self.w, self.rank, self.group = w, rank, w.group
        single = ShardGroup.single()
        self.basis_group, self.image_group = (single, self.group) if w.tall else (self.group, single)
        self.units_are_free = w.tall or self.group.size == 1
        self.size = self.iterations = self._summed = 0
        self.estimate, self.steep = math.nan, False
        self.was_loose = w.tf32
        self.apart = max(rank // 2, _APART)
        self.recurrence: list[tuple[Tensor, Tensor]] | None = None if w.tf32 else []
        self.gram: Tensor | None = None
        self.ahead: Tensor | None = None

    def to_image(self, x: Tensor) -> Tensor:
        """Map vectors laid out like the basis to vectors laid out like the image."""
        return self.w.rows_of(x) if self.w.tall else self.w.columns_of(x)

    def to_basis(self, y: Tensor) -> Tensor:
        """Map vectors laid out like the image to vectors laid out like the basis."""
        return self.w.columns_of(y) if self.w.tall else self.w.rows_of(y)

    def run(self, seed: int, width: int, power_iterations: int, tolerance: float | None, start: Tensor | None) -> None:
        """Build the basis; see `randomized_svd`."""
        dimension = width * (power_iterations + 1)
        if dimension >= (_FULL_SHARE if self.units_are_free else 1) * self.w.short:
            self.take_everything(seed)
            return
        limit = dimension
        if tolerance is not None:
            # At least three increments, hence two estimates.
            limit = min(max(_MAX_GROWTH * dimension, self.rank + 4 * self.apart), self.w.short)
            self.estimate = math.inf
        self.allocate(limit)
        self.append(self.first_block(seed, width, start))
        history: list[float] = []
        due = self.rank + self.apart
        while self.size < limit:
            self.append(self.next_block(min(width, limit - self.size)))
            self.iterations += 1
            if tolerance is not None and (self.size >= due or self.size == limit):
                due = self.size + self.apart
                if self.converged(history, tolerance):
                    break

    def allocate(self, dimension: int) -> None:
        rows, columns = self.w.block.shape
        self.basis = self.w.block.new_empty(dimension, columns if self.w.tall else rows)
        self.image = self.w.block.new_empty(dimension, rows if self.w.tall else columns)

    def first_block(self, seed: int, width: int, start: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(width, self.w.block.shape[1], generator=generator).to(self.w.block.device)
        if start is not None:
            sketch[: start.shape[1]] = start.mT
        first, _ = orthonormal_rows(sketch if self.w.tall else self.w.rows_of(sketch), self.basis_group)
        return first

    def take_everything(self, seed: int) -> None:
        """Span the whole space, so that the result is exact to rounding."""
        self.estimate, self.w.tf32, self.was_loose = 0.0, False, False
        if self.units_are_free:
            self.basis = torch.eye(self.w.short, device=self.w.block.device)
            self.image = self.w.block.mT if self.w.tall else self.w.block
            self.size = self.width = self.w.short
        else:
            self.allocate(self.w.short)
            self.append(self.first_block(seed, self.w.short, None))

    def next_block(self, width: int) -> Tensor:
        """Apply A to the last block and orthonormalize the product against the whole basis."""
        last = self.image[self.size - self.width : self.size]
        if not self.steep:
            back = self.to_basis(last) if self.ahead is None else self.group.sum(self.ahead)
            y, condition = self.orthogonal_product(last, back[:width])
            self.w.tf32 = self.w.tf32 and condition < _STEEP_TF32
            self.steep = not condition < _STEEP
        if self.steep:
            self.recurrence = None
            last, _ = orthonormal_rows(last, self.image_group)
            y, _ = self.orthogonal_product(last, self.to_basis(last)[:width])
        return y

    def orthogonal_product(self, last: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Orthonormalize `y`, `to_basis` of the first of the `last` vectors, against the basis; also its condition."""
        # In exact arithmetic the product overlaps with the last two blocks only [GU]. Where the basis is sharded, the
        # images give the overlap without communication: U_i^T W Z = Z_i^T Z.
        recent = slice(max(0, self.size - 2 * self.width), self.size)
        overlap = y @ self.basis[recent].mT if self.w.tall else last[: len(y)] @ self.image[recent].mT
        y = torch.addmm(y, overlap, self.basis[recent], alpha=-1)
        own = overlap[:, -self.width :]
        basis, conditions, link = self.basis[: self.size], [], None
        for _ in range(_MAX_PASSES):
            overlap = self.basis_group.sum(y @ basis.mT)
            y, lower = orthonormal_rows(torch.addmm(y, overlap, basis, alpha=-1), self.basis_group)
            diagonal = lower.diagonal().abs()
            sizes = torch.stack([*torch.aminmax(diagonal), vector_norm(lower), vector_norm(overlap).double()])
            least, most, whole, left_over = sizes.tolist()  # one transfer: each waits for the device
            conditions.append(_ratio(most, least))
            link = lower if link is None else link @ lower
            # The remaining overlap comes from rounding of y and from the basis not being exactly orthogonal. The
            # normalization enlarges both, and the second could otherwise grow from block to block.
            if whole < _MAX_LOSS * least and left_over < least:
                break
        if self.recurrence is not None and link is not None:
            self.recurrence.append((own, link))
        return y, conditions[0]

    def append(self, block: Tensor) -> None:
        self.width = len(block)
        end = self.size + self.width
        self.basis[self.size : end] = block
        image, self.ahead = self.image[self.size : end], None
        goes_on = end < len(self.basis) and not self.steep
        if goes_on and self.w.goes_there_and_back:
            self.ahead = self.w.there_and_back(block, image)
        else:
            image.copy_(self.to_image(block))
        self.size = end

    def gram_share(self) -> Tensor:
        """This rank's entries of the image for sums of products: its own, or a share of replicated ones."""
        image = self.image[: self.size]
        return image if self.w.tall else image.tensor_split(self.group.size, dim=1)[self.group.rank]

    def summed_gram(self) -> Tensor:
        """This rank's part of the Gram matrix of the image; a replicated image is divided among the ranks."""
        image = self.gram_share()
        if self.gram is None:
            self.gram = self.w.block.new_zeros(len(self.basis), len(self.basis), dtype=torch.float64)
        fresh = slice(self._summed, self.size)
        self.gram[fresh, : self.size] = gram(image[fresh], image[: self.size])
        self._summed = self.size
        return self.gram[: self.size, : self.size].clone()

    def projected(self, last: Tensor) -> Tensor:
        """The lower triangle of the block tridiagonal ``basis A basis^T``, from the recurrence and the `last` block."""
        if self.recurrence is None:
            return last
        out, start = last.new_zeros(self.size, self.size), 0
        for own, link in self.recurrence:
            middle, stop = start + len(own), start + len(own) + link.shape[1]
            out[start:middle, start:middle] = own
            out[middle:stop, start:middle] = link.mT
            start = middle
        out[start:, start:] = last
        return out

    def converged(self, history: list[float], tolerance: float) -> bool:
        """Update the estimate and compare it with `tolerance`; `history` is ``||W||_F^2``, then captured energies."""
        out = torch.empty(1, dtype=torch.float64, device=self.w.block.device)
        r = self.rank
        self.group.reduce_once(self.summed_gram(), out, lambda gram: torch.linalg.eigvalsh(gram)[-r:].sum()[None])
        if not history:
            history.append(self.w.squared_norm())
        history.append(float(out))
        if self.size == self.w.short:
            self.estimate = 0.0
        elif len(history) > 3:
            self.estimate = estimated_excess(history[0], history[1:])
        return self.estimate <= tolerance

    def estimate_in_hindsight(self) -> None:
        """Estimate the excess residual from the energies that the first directions of the basis had captured."""
        r, size = self.rank, self.size
        apart = max(r // 2, min(self.apart, (size - r) // 2))
        sizes = [d for d in (size - 2 * apart, size - apart, size) if d >= r]
        energies = torch.empty(len(sizes), dtype=torch.float64, device=self.w.block.device)
        self.group.reduce_once(
            self.summed_gram(),
            energies,
            lambda gram: torch.stack([torch.linalg.eigvalsh(gram[:d, :d])[-r:].sum() for d in sizes]),
        )
        enough = len(sizes) == 3 and apart > 1
        self.estimate = estimated_excess(self.w.squared_norm(), energies.tolist()) if enough else math.inf

    def triplets(self) -> SVD:
        """Rayleigh-Ritz: the r leading singular triplets of W restricted to the basis."""
        r, size = self.rank, self.size
        self.w.tf32 = False
        mix = torch.empty(r, size, device=self.w.block.device)
        fast = math.isnan(self.estimate)  # without a tolerance, fp32 is tried first
        if fast:
            image = self.gram_share()[0 if self.recurrence is None else size - self.width :]
            self.group.reduce_once(image @ image.mT, mix, lambda last: _leading(self.projected(last), r))
        if not fast or bool(mix[0, 0].isnan()):
            self.group.reduce_once(self.summed_gram(), mix, lambda gram: _leading(gram, r))
        basis, lower = orthonormal_rows(mix @ self.basis[:size], self.basis_group)
        # Always well-conditioned, unless the basis reached the null space.
        if _condition(lower) < _MAX_LOSS and not self.was_loose:
            # Not (inverse @ mix) @ image: an fp32 `mix` cannot hold the corrections that small triplets need.
            image = torch.linalg.inv(lower).float() @ (mix @ self.image[:size])
        else:
            image = self.to_image(basis)
        image, lower = orthonormal_rows(image, self.image_group)
        packed = torch.empty(2 * r + 1, r, dtype=torch.float64, device=self.w.block.device)
        self.group.once(packed, lambda: _small_svd(lower))
        basis, image = packed[:r].float() @ basis, packed[r + 1 :].float() @ image
        u, vh = (image, basis) if self.w.tall else (basis, image)
        signs = row_signs(vh)
        return SVD((u * signs).mT.contiguous(), packed[r].float(), vh * signs, self.iterations, self.estimate)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors as rows, fp32; NaNs if an fp32 Gram matrix is not accurate enough."""
    # fp32 is faster on a CPU. On CUDA it uses Jacobi's method, three times slower than fp64 (512 x 512).
    values, vectors = torch.linalg.eigh(gram.double() if gram.is_cuda else gram.float())
    if not float(values[-rank]) > _FLAT * float(values[-1]):
        if gram.dtype == torch.float32:
            return gram.new_full((rank, len(gram)), torch.nan)
        if not gram.is_cuda:
            vectors = torch.linalg.eigh(gram)[1]
    leading: Tensor = vectors.float().mT[-rank:].flip(0)
    return leading


def _condition(lower: Tensor) -> float:
    """Condition number of a triangular factor, estimated from its diagonal; replicated if the factor is."""
    low, high = torch.stack(torch.aminmax(lower.diagonal().abs())).tolist()
    return _ratio(high, low)


def _ratio(high: float, low: float) -> float:
    return high / low if low > 0 else math.inf


def _small_svd(lower: Tensor) -> Tensor:
    """SVD ``lower = A S B``, packed as rows ``[A^T; s; B]`` for one broadcast; A^T rotates the basis, B the image."""
    a, s, b = torch.linalg.svd(lower)
    return torch.cat([a.mT, s[None], b])
