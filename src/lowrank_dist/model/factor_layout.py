"""How the update of a matrix is parametrized: which parameters are trained, and what adapter files hold.

A method owns its layout (`lowrank_dist.methods.Method.layout`). Code that makes, counts, writes or reads the parameters
of an adapter asks the layout and knows none by name. A new layout is a new class here, with its own entry in manifests
(`FactorLayout.facts`, `stored_layout`).

Adapter files hold A and B, as PEFT expects. A layout with further parameters computes ``f(B) A``: its adapter files
hold ``f(B)`` in place of B, and B is kept beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.model.names import ADAPTER, peft_name
from lowrank_dist.storage.parse import Record, is_number

if TYPE_CHECKING:
    from lowrank_dist.model.plan import PlannedMatrix


@dataclass(frozen=True, kw_only=True)
class FactorLayout(ABC):
    """The parameters of an adapter: A ``[r, in]``, B ``[out, r]`` and possibly further ones.

    Attributes
    ----------
    trained
        The factors that are trained, of A (``lora_A``) and B (``lora_B``).
    further
        Names of the parameters beside A and B, all trained. In the model they belong to the module that replaces
        PEFT's ``lora_B`` and also holds B (`lowrank_dist.layers.frozen.ExtendedLinear`).
    adds_product
        Whether the model adds ``scaling * B A`` to the residual at step 0. If not, it adds zero or almost zero.
    """

    trained: ClassVar[tuple[str, ...]]
    further: ClassVar[tuple[str, ...]] = ()
    adds_product: ClassVar[bool] = True

    @abstractmethod
    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        """Shapes of the further parameters of a matrix."""

    @abstractmethod
    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        """Whole further parameters at step 0, in fp32; the same on every rank."""

    @abstractmethod
    def multiply(self, x: Tensor, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """``x f(B)^T``, ``[..., out]``, for x ``[..., r]``."""

    @abstractmethod
    def folded(self, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """Whole ``f(B)``, ``[out, r]`` in the dtype of B; also works on meta."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Manifest entries, from which `stored_layout` restores the layout."""

    @property
    def derived(self) -> tuple[str, ...]:
        """Nothing: the adapter file holds parameters only."""
        return ()

    @property
    def is_lora(self) -> bool:
        """True: whatever is trained, its update is ``scaling * f(B) A``."""
        return True

    def stored_as(self, name: str) -> str | None:
        """PEFT's name in the adapter file for the parameter `name` of the backbone; None if it is kept beside."""
        return None if self.kept_beside(name) else peft_name(name)

    @property
    def folds(self) -> bool:
        """Whether adapter files hold ``f(B)`` in place of B, which is kept beside them."""
        return bool(self.further)

    def parameter_shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        """Shapes of the further parameters of a matrix, by name in the backbone; none if it has no adapter."""
        if planned.rank == 0:
            return {}
        return {f"{planned.layer}{_end(name)}": shape for name, shape in self.shapes(planned).items()}

    def kept_beside(self, name: str) -> bool:
        """Whether adapter files lack the trained parameter `name` of the backbone, because they hold ``f(B)``."""
        names = self._inside if "lora_B" in self.trained else self.further
        return name.endswith(tuple(map(_end, names)))

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the adapter file, under PEFT's names.

        Parameters
        ----------
        parameters
            Whole parameters of the adapter, by name in the backbone: for each layer all or none. They may be on meta.
        """
        ends = tuple(map(_end, self._inside))
        adapter = {peft_name(name): tensor for name, tensor in parameters.items() if not name.endswith(ends)}
        inside: dict[str, dict[str, Tensor]] = {}
        for name in parameters:
            if name.endswith(ends):
                module, _, leaf = name.rpartition(".")
                inside.setdefault(module, {})[leaf] = parameters[name]
        for module, tensors in inside.items():
            adapter[peft_name(f"{module}.weight")] = self.folded(tensors.pop("weight"), tensors)
        return adapter

    @property
    def _inside(self) -> tuple[str, ...]:
        """Names of the parameters in the module that replaces ``lora_B``; empty if PEFT's module stays."""
        return ("weight", *self.further) if self.further else ()


def _end(name: str) -> str:
    """Suffix of the name, in the backbone, of a parameter in the module that replaces ``lora_B``."""
    return f".lora_B.{ADAPTER}.{name}"


@dataclass(frozen=True, kw_only=True)
class TrainedFactors(FactorLayout):
    """A and B are trained, as in LoRA."""

    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        return {}

    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        return {}

    def multiply(self, x: Tensor, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.linear(x, b)

    def folded(self, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return b

    def facts(self) -> dict[str, Any]:
        return {"core": None}


class CoreLayout(FactorLayout):
    """A core R ``[r, r]`` between the factors is trained, ``B R A``; the factors are frozen."""

    trained: ClassVar[tuple[str, ...]] = ()
    further: ClassVar[tuple[str, ...]] = ("core",)
    adds_product: ClassVar[bool] = False

    @abstractmethod
    def matrix(self, core: Tensor, rank: int) -> Tensor:
        """R, ``[r, r]``, from the parameter that is trained."""

    def multiply(self, x: Tensor, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.matrix(further["core"], b.shape[1])), b)

    def folded(self, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return (b.float() @ self.matrix(further["core"], b.shape[1]).float()).to(b.dtype)


@dataclass(frozen=True, kw_only=True)
class TrainedCore(CoreLayout):
    """All of R is trained, as in LoRA-XS.

    Parameters
    ----------
    std
        Standard deviation of R at step 0; its elements are drawn from ``N(0, std^2)``.
    seed
        Mixed with the weight's name into the seed of R.
    """

    std: float
    seed: int = 0

    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        return {"core": (planned.rank, planned.rank)}

    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_from_name(f"{planned.key}:core", self.seed))
        return {"core": torch.randn(planned.rank, planned.rank, generator=generator) * self.std}

    def matrix(self, core: Tensor, rank: int) -> Tensor:
        return core

    def facts(self) -> dict[str, Any]:
        return {"core": asdict(self) if self.seed else self.std}


CorePattern = Literal["plain", "banded", "random"]


@dataclass(frozen=True, kw_only=True)
class SparseCore(CoreLayout):
    """Some entries of R are trained, from zero, as in SVFT; the others are zero and are stored nowhere.

    Parameters
    ----------
    pattern : {"plain", "banded", "random"}
        Which entries: the diagonal; a band around it; or as many as the band has, at random positions.
    off_diagonal
        Number d of diagonals on each side of the band: ``|i - j| <= d``.
    seed
        Seed of the random positions. Matrices of equal rank have the same positions.
    """

    pattern: CorePattern
    off_diagonal: int
    seed: int

    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        return {"core": (len(self.positions(planned.rank)),)}

    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        return {"core": torch.zeros(*self.shapes(planned)["core"])}

    def matrix(self, core: Tensor, rank: int) -> Tensor:
        where = self.positions(rank).to(core.device)
        return core.new_zeros(rank * rank).index_put((where,), core).view(rank, rank)

    def positions(self, rank: int) -> Tensor:
        """Indices of the trained entries in the flattened R, ascending."""
        return _positions(self, rank)

    def facts(self) -> dict[str, Any]:
        return {"core": asdict(self)}


@cache
def _positions(layout: SparseCore, rank: int) -> Tensor:
    index = torch.arange(rank)
    width = 0 if layout.pattern == "plain" else layout.off_diagonal
    band = ((index[:, None] - index).abs() <= width).flatten().nonzero().flatten()
    if layout.pattern != "random":
        return band
    generator = torch.Generator().manual_seed(seed_from_name(f"core of rank {rank}", layout.seed))
    return torch.randperm(rank * rank, generator=generator)[: len(band)].sort().values


def stored_layout(manifest: Mapping[str, Any]) -> FactorLayout:
    """The layout whose `FactorLayout.facts` a manifest holds; `TrainedFactors` if it holds none (other origin)."""
    core = manifest.get("core")
    if core is None:
        return TrainedFactors()
    if not isinstance(core, Mapping):
        return TrainedCore(std=Record(manifest, "the manifest").expect("core", is_number, "a number or an object"))
    entry = Record(core, "the core in the manifest")
    if "std" in entry:
        return TrainedCore(std=entry.expect("std", is_number, "a number"), seed=entry.integer("seed", low=-(2**63)))
    return SparseCore(
        pattern=entry.expect("pattern", lambda name: name in get_args(CorePattern), "a pattern of SVFT"),
        off_diagonal=entry.integer("off_diagonal", high=2**20),
        seed=entry.integer("seed", low=-(2**63)),
    )
