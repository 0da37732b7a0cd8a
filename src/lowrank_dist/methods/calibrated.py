"""What methods that need calibration data share: their statistic and its leading singular triplets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.linalg import SVD, randomized_svd, seed_from_name
from lowrank_dist.methods.base import Matrix
from lowrank_dist.methods.principal import PrincipalMethod


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(PrincipalMethod):
    """A method that needs a calibration pass; subclasses name the `statistic` that they need.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        hints = get_type_hints(type(self))
        for field in fields(self):
            choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise InputError(f"{self}: {field.name}={value!r} is none of {', '.join(choices)}")

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        if lookup and self.statistic == "covariance":
            return (
                f"{self} needs the covariance of a layer's inputs, but those of an embedding are ids; drop it from "
                "target_modules"
            )
        return None

    def measured(self, matrix: Matrix) -> Tensor:
        """Return this rank's rows of the statistic; shapes and sharding are those of ``Matrix.statistic``.

        Raises
        ------
        InputError
            If there was no calibration pass.
        """
        if matrix.statistic is None:
            raise InputError(
                f"{self} needs the {self.statistic} of {matrix.name} from a calibration pass; "
                "give the strategy data for it: PiSSAStrategy(calibration=...)"
            )
        return matrix.statistic

    def check_seen(self, matrix: Matrix, variance: float) -> None:
        """Raise InputError if the `variance` of a layer's inputs (total or mean, the same on all ranks) is zero."""
        if not variance > 0:
            raise InputError(
                f"{self}: the covariance of {matrix.name} is zero, its layer saw no input in the calibration pass; "
                "calibrate on more data or drop it from target_modules"
            )

    def leading(self, matrix: Matrix, block: Tensor, rank: int, *, rows: int) -> SVD:
        """Leading `rank` triplets of a row-sharded matrix of `rows` rows, computed in the group of `matrix`."""
        return randomized_svd(
            block,
            rank,
            rows=rows,
            group=matrix.group,
            seed=seed_from_name(matrix.name, self.seed),
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            tolerance=self.tolerance,
        )
