"""How the update of a matrix is parametrized: what of it is trained, and what stands for it in files.

A method owns its layout (`lowrank_dist.methods.Method.layout`). Whoever makes, counts, writes or reads the parameters
of an adapter asks the layout, and knows none by name. Another layout is another class here, with an entry of its own in
manifests (`FactorLayout.facts`, `stored_layout`).

Files hold adapters as PEFT knows them, A and B. A layout with further parameters computes with ``f(B) A``: it has
``f(B)`` there in the place of B, which is kept beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.model.names import ADAPTER, peft_name

if TYPE_CHECKING:
    from lowrank_dist.model.plan import PlannedMatrix


@dataclass(frozen=True, kw_only=True)
class FactorLayout(ABC):
    """What the parameters of an adapter are, beside A ``[r, in]`` and B ``[out, r]``.

    Attributes
    ----------
    trained
        Those of A (``lora_A``) and B (``lora_B``) that are trained.
    further
        Names of the parameters beside A and B, all trained. In the model they lie beside B, in the module that takes
        the place of PEFT's ``lora_B`` (`lowrank_dist.layers.frozen.ExtendedLinear`).
    adds_product
        Whether at step 0 the model adds ``scaling * B A`` to the residual; else it adds nothing, or next to nothing.
    """

    trained: ClassVar[tuple[str, ...]]
    further: ClassVar[tuple[str, ...]] = ()
    adds_product: ClassVar[bool] = True

    @abstractmethod
    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        """Shapes of the further parameters of a matrix."""

    @abstractmethod
    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        """Values of the further parameters at step 0, fp32, whole; the same on every rank."""

    @abstractmethod
    def multiply(self, x: Tensor, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """``x f(B)^T``, ``[..., out]``, for x ``[..., r]``."""

    @abstractmethod
    def folded(self, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """``f(B)``, ``[out, r]`` in the dtype of B, whole; on meta too."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Entries of a manifest, from which `stored_layout` gives the layout back."""

    @property
    def folds(self) -> bool:
        """Whether adapter files hold ``f(B)``, and B is kept beside it."""
        return bool(self.further)

    def parameter_shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        """Shapes of the further parameters of a matrix, by their names in the backbone."""
        return {f"{planned.layer}{_end(name)}": shape for name, shape in self.shapes(planned).items()}

    def kept_beside(self, name: str) -> bool:
        """Whether the trained parameter `name` of the backbone is in no adapter file, which has ``f(B)`` instead."""
        names = self._inside if "lora_B" in self.trained else self.further
        return name.endswith(tuple(map(_end, names)))

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PEFT's adapter holds, under its names.

        Parameters
        ----------
        parameters
            Whole parameters of the adapter, all of a layer or none, by their names in the backbone; on meta too.
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
        """Names in the module at the place of ``lora_B``, where it is not PEFT's."""
        return ("weight", *self.further) if self.further else ()


def _end(name: str) -> str:
    """What the name in the backbone of a parameter at the place of ``lora_B`` ends with."""
    return f".lora_B.{ADAPTER}.{name}"


@dataclass(frozen=True, kw_only=True)
class TrainedFactors(FactorLayout):
    """A and B are trained, as LoRA does."""

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


@dataclass(frozen=True, kw_only=True)
class TrainedCore(FactorLayout):
    """A and B are frozen, and a core R ``[r, r]`` between them is trained: ``B R A``, as LoRA-XS does.

    Parameters
    ----------
    std
        Standard deviation of R at step 0, which is drawn from ``N(0, std^2)``.
    """

    std: float
    trained: ClassVar[tuple[str, ...]] = ()
    further: ClassVar[tuple[str, ...]] = ("core",)
    adds_product: ClassVar[bool] = False

    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        return {"core": (planned.rank, planned.rank)}

    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_from_name(f"{planned.key}:core"))
        return {"core": torch.randn(planned.rank, planned.rank, generator=generator) * self.std}

    def multiply(self, x: Tensor, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, further["core"]), b)

    def folded(self, b: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        return (b.float() @ further["core"].float()).to(b.dtype)

    def facts(self) -> dict[str, Any]:
        return {"core": self.std}


def stored_layout(manifest: Mapping[str, Any]) -> FactorLayout:
    """The layout whose `FactorLayout.facts` a manifest holds; a model of other origin has A and B."""
    core = manifest.get("core")
    return TrainedFactors() if core is None else TrainedCore(std=core)
