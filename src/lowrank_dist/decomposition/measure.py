"""Measures of a matrix while it is decomposed: its norms, its quantization error and its spectrum.

Ranks exchange the measures of a matrix as a row of fp64 numbers, in which NaN stands for "not measured". `report_of`
turns a row into a report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.linalg import full_fp32, seed_from_name, slabs, squared_norm
from lowrank_dist.linalg.nuclear_norm import nuclear_norm
from lowrank_dist.methods.base import Decomposition, Matrix, Method
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat

ENDS = ("quantize", "decompose")
_NAMES = (
    "norm",
    "error",
    "quantization_error",
    "nuclear_error",
    "nuclear_quantization_error",
    "sigma_1",
    "sigma_r",
    "captured_energy",
    "excess_residual",
    "ended_on",
)


class Norms(NamedTuple):
    """Norms of a row-sharded matrix."""

    square: Tensor  # this rank's part of the squared Frobenius norm, fp64
    nuclear: float = math.nan  # of the whole matrix


def measures_of(rank: int) -> int:
    """Length of the row of measures of a matrix of rank `rank`: the named measures, then the spectrum."""
    return len(_NAMES) + rank


def report_of(planned: PlannedMatrix, measured: Tensor) -> MatrixReport:
    """Make the report of a matrix from its row of measures, which `Measure.after` filled."""
    values = [value if math.isfinite(value) else None for value in measured.tolist()]
    measures: dict[str, Any] = dict(zip(_NAMES, values, strict=False))
    if measures["ended_on"] is not None:
        measures["ended_on"] = ENDS[int(measures["ended_on"])]
    spectrum = values[len(_NAMES) : measures_of(planned.rank)]
    measures["singular_values"] = None if None in spectrum else spectrum
    return MatrixReport(name=planned.name, rows=planned.rows, columns=planned.columns, rank=planned.rank, **measures)


class Measure:
    """Measures matrices before and after `init` decomposes them.

    Parameters
    ----------
    init, residual
        How matrices are decomposed, and how the residual is stored.
    thorough
        Also measure nuclear norms of the errors, which may cost more than the decomposition.
    """

    def __init__(self, init: Method, residual: ResidualFormat, *, thorough: bool) -> None:
        self.init, self.residual, self.thorough = init, residual, thorough

    def before(self, matrix: Matrix) -> dict[str, Norms]:
        """Norms of W, and of the error of plain quantization unless the decomposition yields that error itself.

        Called before the decomposition, which may overwrite W. Collective in the group of `matrix` if nuclear norms are
        measured or if `ResidualFormat.encode` is collective.
        """
        norms = {"norm": Norms(squared_norm(matrix.block))}
        if not self.residual.exact and not self.init.starts_at_zero:
            plain = self.residual.encode(matrix.block, matrix.partition, matrix.group)
            norms["quantization_error"] = self._norms(matrix, lambda rows: matrix.block[rows] - plain.rows(rows))
        return norms

    def after(self, matrix: Matrix, decomposition: Decomposition, before: dict[str, Norms], *, out: Tensor) -> None:
        """Fill the row `out` with the measures of one matrix. One all-reduce of squared norms.

        Parameters
        ----------
        matrix, decomposition
            Row-sharded; W itself may be gone if the decomposition has ``encoded_of``.
        before
            The result of `before`.
        out
            ``[measures_of(rank)]`` or longer, fp64, replicated.
        """
        norms = {**before, "error": self._norms(matrix, self._missing_at_step_0(matrix, decomposition))}
        if not self.residual.exact:
            norms.setdefault("quantization_error", norms["error"])
        roots = matrix.group.sum(torch.stack([norm.square for norm in norms.values()])).sqrt().tolist()
        found = {"quantization_error": 0.0, **dict(zip(norms, roots, strict=True))}
        found |= {f"nuclear_{name}": norm.nuclear for name, norm in norms.items()}
        svd = decomposition.svd
        if svd is not None:
            found |= {"sigma_1": float(svd.s[0]), "sigma_r": float(svd.s[-1]), "excess_residual": svd.estimate}
            energy = float(svd.s.double().square().sum())
            found["captured_energy"] = energy / found["norm"] ** 2 if found["norm"] else math.nan
            out[len(_NAMES) : measures_of(matrix.rank)] = svd.s
        if not self.residual.exact:
            found["ended_on"] = float(ENDS.index(decomposition.ended_on))
        out[: len(_NAMES)] = torch.tensor([found.get(name, math.nan) for name in _NAMES])

    def _norms(self, matrix: Matrix, error: Callable[[slice], Tensor]) -> Norms:
        """Norms of an error; ``error(rows)`` returns the given slice of this rank's rows of it."""
        zero = matrix.block.new_zeros((), dtype=torch.float64)
        square = sum((squared_norm(error(rows)) for rows in slabs(matrix.block)), zero)
        if not self.thorough or self.residual.exact:
            return Norms(square)
        # both errors are probed with the same seed, so that estimation errors cancel in their ratio
        rows, seed = matrix.partition.rows, seed_from_name(matrix.name)
        return Norms(square, nuclear_norm(error(slice(None)), rows=rows, group=matrix.group, seed=seed))

    def _missing_at_step_0(self, matrix: Matrix, decomposition: Decomposition) -> Callable[[slice], Tensor]:
        """Return a function of a slice of this rank's rows: W minus the weight that the model uses at step 0."""
        factors, kept, encoded_of = decomposition.factors, decomposition.residual, decomposition.encoded_of

        def missing(rows: slice) -> Tensor:
            if encoded_of is not None:
                return encoded_of[rows] - kept.rows(rows)
            error = matrix.block[rows] - kept.rows(rows)
            if self.init.layout.adds_product:
                with full_fp32():
                    error.addmm_(factors.left[rows], factors.right, alpha=-matrix.scaling)
            return error

        return missing
