"""What methods share that train a core between two frozen factors."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.methods.principal import PrincipalMethod


@dataclass(frozen=True, kw_only=True)
class CoreMethod(PrincipalMethod):
    """A method whose residual is W itself, and whose factors are frozen; subclasses say by `layout` what is trained.

    Parameters
    ----------
    power_iterations, oversampling, tolerance, seed
        Options of the randomized SVD, see `PrincipalMethod`.
    """

    @property
    def starts_at_zero(self) -> bool:
        return True

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        if lookup or wrapped:
            return f"{self} puts its core between the factors of linear layers only; drop it from the targets"
        return None
