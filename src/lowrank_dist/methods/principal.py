"""Options and arithmetic shared by the methods that take the leading singular triplets of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.linalg import SVD, randomized_svd, seed_from_name
from lowrank_dist.methods.base import Factors, Matrix, Method, Work


@dataclass(frozen=True, kw_only=True)
class PrincipalMethod(Method):
    """Options of the randomized SVD.

    Parameters
    ----------
    power_iterations
        Number of passes over W^T W. More passes make the result more accurate at equal flops and cost an all-reduce
        each; see `lowrank_dist.linalg.randomized_svd`.
    oversampling
        Number of directions that are computed beyond r and dropped at the end. Default: 3 r. Flops and memory grow with
        it.
    tolerance
        Iterate until the estimated excess residual ``||W - U S V^T||_F / ||W - W_r||_F - 1`` is below it, instead of a
        fixed number of passes.
    seed
        Mixed with the weight's name into the seed of the test matrix.

    Notes
    -----
    The excess residual depends on the spectrum. On a layer of SmolLM2-135M, whose spectra are flat, the worst of seven
    matrices has 6.8e-4 (r = 16), 3.6e-4 (64) and 4e-12 (128) by default; `torch.svd_lowrank` as PEFT's
    ``pissa_niter_4`` calls it leaves 8e-3 to 2e-2 in 0.45 to 0.76 times the time of the default, ``pissa_niter_16``
    9e-4 to 1.6e-3 in 1.5 to 2.4 times. On a spectrum i^-0.5 the default leaves 1.7e-11 (r = 64) in 1.1 times the time
    in which ``pissa_niter_4`` leaves 3.9e-3 (`benchmarks/bench_svd_iterations.py`, one process and thread).
    """

    power_iterations: int = 15
    oversampling: int | None = None
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.power_iterations < 0:
            raise InputError(f"{self}: power_iterations={self.power_iterations} must not be negative")
        if self.oversampling is not None and self.oversampling < 0:
            raise InputError(f"{self}: oversampling={self.oversampling} must not be negative")
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(f"{self}: tolerance={self.tolerance} must be positive; an excess residual, such as 1e-3")

    def work(self, rows: int, columns: int, rank: int) -> Work:
        return svd_work(rows, columns, rank, self.oversampling, self.power_iterations)

    def principal_factors(self, matrix: Matrix, block: Tensor, start: Tensor | None = None) -> tuple[Factors, SVD]:
        """Rank-r factors of `block` (``[m_p, n]``, rows of a matrix partitioned like `matrix`).

        Both factors carry ``sqrt(S / scaling)``, so that ``scaling * left @ right = U S V^T`` ([PiSSA], eq. 2-3).

        Returns
        -------
        factors
            Rounded to ``matrix.factor_dtype``.
        svd
            The decomposition that they come from; its right vectors are a warm start for a similar matrix.
        """
        svd = randomized_svd(
            block,
            matrix.rank,
            rows=matrix.partition.rows,
            group=matrix.group,
            seed=seed_from_name(matrix.name, self.seed),
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            tolerance=self.tolerance,
            start=start,
            estimated=matrix.thorough,
        )
        return balanced(svd, matrix.scaling).rounded(matrix.factor_dtype), svd


def balanced(svd: SVD, scaling: float) -> Factors:
    """Factors that carry ``sqrt(S / scaling)`` each, so that ``scaling * left @ right = U S V^T``."""
    root = (svd.s / scaling).sqrt()
    return Factors(left=svd.u * root, right=root[:, None] * svd.vh)


def with_estimate_of(last: SVD, first: SVD) -> SVD:
    """Return the `last` of several decompositions with the estimate of the `first`; refinements have no estimate."""
    return last._replace(iterations=first.iterations, estimate=first.estimate)


def svd_work(rows: int, columns: int, rank: int, oversampling: int | None, power_iterations: int) -> Work:
    """Upper bound of the cost of `lowrank_dist.linalg.randomized_svd`, by the formulas of its docstring."""
    short, long, tall = min(rows, columns), max(rows, columns), rows >= columns
    dimension = rank + (3 * rank if oversampling is None else oversampling)
    width, passes = -(-dimension // (power_iterations + 1)), power_iterations
    if dimension >= (2 / 3 if tall else 1) * short:  # randomized_svd decomposes the Gram matrix of the short side
        dimension, width, passes = short, short, 0
    products = 2.0 * rows * columns * (2 * dimension - width)
    basis, gram = 2.0 * dimension**2 * short, 2.0 * dimension**2 * long
    return Work(
        sharded_flops=products + gram + (0.0 if tall else basis),
        replicated_flops=10.0 * dimension**3 + (basis if tall else 0.0),
        collectives=passes * (1 if tall else 4) + 9,
        reduced_bytes=4.0 * (passes * width * columns + 2 * dimension**2),
    )


@dataclass(frozen=True, kw_only=True)
class AlternatingMethod(PrincipalMethod):
    """A principal method that alternates with the quantization of the residual.

    A round after the first starts from the r right singular vectors of the round before and takes at most one pass. The
    matrix has changed by a quantization error only, so that neither more passes nor more directions lower the error. On
    four matrices of SmolLM2-135M (NF4, T = 5, r = 64) the error reductions are .330 .608 .454 .318 with one pass, the
    same to a digit with 7 and oversampling, and .302 .609 .384 .318 with none.

    Parameters
    ----------
    quantization_iterations
        T, the number of quantizations of the residual.
    """

    quantization_iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization_iterations < 1:
            raise InputError(f"{self}: quantization_iterations={self.quantization_iterations} must be at least 1")

    def work(self, rows: int, columns: int, rank: int) -> Work:
        first, later = super().work(rows, columns, rank), svd_work(rows, columns, rank, rank, 1)
        return Work(**{name: value + self.refinements * getattr(later, name) for name, value in vars(first).items()})

    @property
    def refinements(self) -> int:
        """Number of decompositions after the first."""
        return self.quantization_iterations - 1

    def refined_factors(self, matrix: Matrix, block: Tensor, last: SVD) -> tuple[Factors, SVD]:
        """Return `principal_factors` of a `block` that differs little from the one that `last` decomposed."""
        once = replace(self, power_iterations=min(self.power_iterations, 1), oversampling=0, tolerance=None)
        return once.principal_factors(matrix, block, last.vh.mT)
