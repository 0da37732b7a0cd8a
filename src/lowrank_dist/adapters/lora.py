"""The exact LoRA: converts an adapter for the residual to an ordinary LoRA of twice the rank for the original model.

Let the trained model compute ``W_res + s B A`` with ``W_res = W - s B_0 A_0``, where s is the scaling and ``A_0, B_0``
are the factors before training. Then ::

    W_res + s B A = W + s (B A - B_0 A_0) = W + s [B | -B_0] [A; A_0],

which is a LoRA of rank 2r on W with the same scaling ([PiSSA], appendix on conversion; PEFT's
``path_initial_model_for_weight_conversion`` does the same). The scaling is ``alpha / r``, so alpha doubles with r.
rsLoRA's ``alpha / sqrt(r)`` is written as such a quotient too, because some servers know no other scaling and do not
say so; with ranks by module rsLoRA stays, and alpha grows by ``sqrt(2)``. If the residual is quantized, the model
computes ``Q(W_res) + s B A``. The identity then leaves out ``Q(W_res) - W_res``, whose size the checkpoint's manifest
records.

Everything here works on CPU tensors, without a trainer or a process group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lowrank_dist.adapters.files import changed_config, open_adapter, whole_tensor
from lowrank_dist.errors import CheckpointError
from lowrank_dist.model.stacking import concat_a, concat_b, join_a, join_b, split_a, split_b
from lowrank_dist.storage.layout import ADAPTER_DIR, INITIAL_DIR, read_manifest

if TYPE_CHECKING:
    from peft import LoraConfig

A_NAMES = (".lora_A.weight", ".lora_embedding_A")
B_NAMES = (".lora_B.weight", ".lora_embedding_B")


def to_lora(
    adapter: Mapping[str, Tensor], initial: Mapping[str, Tensor], experts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Factors of the rank-2r LoRA ``[A; A_0]``, ``[B | -B_0]``.

    Parameters
    ----------
    adapter
        Trained tensors under PEFT's names: ``....lora_A.weight`` ``[r, in]``, ``....lora_B.weight`` ``[out, r]``
        (for embeddings ``lora_embedding_A`` and ``_B``), and whole modules (``modules_to_save``), which are returned
        unchanged.
    initial
        ``A_0`` and ``B_0`` under the same names.
    experts
        Number of experts that share a tensor, by name, if it is more than one. They are stacked in PEFT's layout
        (`lowrank_dist.model.stacking`): ``[experts * r, in]`` and ``[out, r * experts]``.

    Returns
    -------
    dict
        Factors ``[2r, in]`` and ``[out, 2r]`` under the same names, in the same dtypes.

    Raises
    ------
    CheckpointError
        If a factor is missing in `initial` or has another shape there.
    """
    converted = {}
    for name, tensor in adapter.items():
        if not name.endswith(A_NAMES + B_NAMES):
            converted[name] = tensor
            continue
        start = initial.get(name)
        if start is None or start.shape != tensor.shape:
            found = "is missing" if start is None else f"has shape {list(start.shape)}"
            raise CheckpointError(
                f"{name} {list(tensor.shape)}: its initial value {found}; pass an adapter and the adapter_init of the "
                "same run"
            )
        if name.endswith(A_NAMES):
            converted[name] = concat_a([tensor, start], (experts or {}).get(name, 1))
        else:
            converted[name] = concat_b([tensor, -start])
    return converted


def lora_config(config: LoraConfig, *, doubled: bool = True) -> LoraConfig:
    """PEFT's configuration of the exact LoRA: the scalings are those of `config`, without rsLoRA where they can be.

    Parameters
    ----------
    config
        The trained adapter's.
    doubled
        Whether every module has twice the rank, because initial factors are taken off.
    """
    more = 2 if doubled else 1
    plain = config.use_rslora and not config.rank_pattern
    grow = more * math.sqrt(config.r) if plain else math.sqrt(more) if config.use_rslora else more
    return changed_config(
        config,
        r=more * config.r,
        lora_alpha=_whole_number(config.lora_alpha * grow),
        use_rslora=config.use_rslora and not plain,
        rank_pattern={name: more * rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={name: _whole_number(alpha * grow) for name, alpha in (config.alpha_pattern or {}).items()},
    )


def _whole_number(alpha: float) -> float:
    """`alpha` as PEFT declares it, an integer, where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """A pair of factors in an adapter file, and what it adapts.

    Attributes
    ----------
    name
        Name of the adapted layer in the model, or of the parameter if PEFT adapts it without its layer
        (``target_parameters``).
    a, b
        Names of the factors in the file.
    rank
        Rank of the exact LoRA.
    scaling
        Scaling of the product of the exact LoRA's factors.
    experts
        Number of matrices that the factors are for, in the layout of `lowrank_dist.model.stacking`.
    """

    name: str
    a: str
    b: str
    rank: int
    scaling: float
    experts: int = 1

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices: `name`, followed by the index of the expert in brackets if there are several."""
        return [self.name] if self.experts == 1 else [f"{self.name}[{expert}]" for expert in range(self.experts)]

    def split(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``[rank, in]`` and ``[out, rank]`` of every matrix, from ``[experts * rank, in], [out, rank * experts]``."""
        return list(zip(split_a(a, self.experts), split_b(b, self.experts), strict=True))

    def join(self, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Factors of all experts from ``[rank, in]`` and ``[out, rank]`` of each; the inverse of `split`."""
        every_a, every_b = zip(*factors, strict=True)
        return join_a(every_a), join_b(every_b)


class ExactLora:
    """The exact LoRA of a checkpoint, for the original model; its factors are read module by module.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.

    Attributes
    ----------
    manifest : dict
        Manifest of the checkpoint.
    config : peft.LoraConfig
        Configuration of the exact LoRA.
    cancels : bool
        Whether its factors are ``[A; A_0]`` and ``[B | -B_0]``, not those of the adapter alone. The update then is the
        difference of two products that are much larger.
    trained : CheckpointReader
        Reader of the trained adapter.
    modules : list of LoraModule
        The pairs of factors, in the order of their names.
    scalings_known : bool
        False if the manifest does not name the parameters under ``target_parameters`` and ``alpha_pattern`` may match
        some of them: the scalings are then a guess.

    Raises
    ------
    CheckpointError
        If `checkpoint` is not a checkpoint, or if the shapes of its factors do not match.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.manifest = read_manifest(checkpoint)
        self.trained, trained_config = open_adapter(checkpoint / ADAPTER_DIR)
        self.cancels = not self.manifest["starts_at_zero"]
        self.config = lora_config(trained_config, doubled=self.cancels)
        self._initial = open_adapter(checkpoint / INITIAL_DIR)[0] if self.cancels else None
        self.modules = [self._module(name, trained_config) for name in sorted(self.trained) if name.endswith(A_NAMES)]
        if not self.modules:
            raise CheckpointError(
                f"{checkpoint / ADAPTER_DIR}: holds no factors of a LoRA; pass a checkpoint with adapted layers"
            )
        ambiguous = trained_config.target_parameters and trained_config.alpha_pattern
        self.scalings_known = "parameters" in self.manifest or not ambiguous

    def _module(self, a: str, config: LoraConfig) -> LoraModule:
        suffix, b_suffix = next(pair for pair in zip(A_NAMES, B_NAMES, strict=True) if a.endswith(pair[0]))
        layer = a.removesuffix(suffix)
        b, experts = layer + b_suffix, self.manifest.get("experts", {}).get(a, 1)
        height, width = (self.trained.info(n).shape[d] if n in self.trained else 0 for n, d in ((a, 0), (b, 1)))
        if height != width or height % experts:
            raise CheckpointError(
                f"{a}: its {height} rows, for {experts} matrices, do not match the {width} columns of {b}; the "
                "checkpoint is damaged"
            )
        name = self.manifest.get("parameters", {}).get(a, layer.removeprefix("base_model.model."))
        rank = height // experts
        return LoraModule(
            name=name,
            a=a,
            b=b,
            rank=rank if self._initial is None else 2 * rank,
            scaling=_scaling(config, name, rank),
            experts=experts,
        )

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(module.rank for module in self.modules)

    @property
    def uniform(self) -> bool:
        """Whether all modules have the same rank and the same scaling, and the scalings are known."""
        return self.scalings_known and len({(module.rank, module.scaling) for module in self.modules}) == 1

    @property
    def whole(self) -> list[str]:
        """Names of the tensors that are not factors (``modules_to_save``)."""
        factors = {name for module in self.modules for name in (module.a, module.b)}
        return [name for name in self.trained if name not in factors]

    def factors(self, module: LoraModule) -> tuple[Tensor, Tensor]:
        """A ``[experts * rank, in]`` and B ``[out, rank * experts]`` of `module`, in the dtype of the checkpoint; CPU.

        Raises
        ------
        CheckpointError
            If they hold NaN or infinity, or if their initial values are missing or have other shapes.
        """
        names = (module.a, module.b)
        factors = {name: whole_tensor(self.trained, name) for name in names}
        for name, tensor in factors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{name}: holds NaN or infinity, because training diverged; use an earlier checkpoint"
                )
        if self._initial is not None:
            initial = {name: whole_tensor(self._initial, name) for name in names if name in self._initial}
            factors = to_lora(factors, initial, dict.fromkeys(names, module.experts))
        return factors[module.a], factors[module.b]


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    """The scaling that PEFT applies to the product of factors of rank `rank`, in the module or parameter `name`."""
    from peft.utils.other import get_pattern_key

    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), name), config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
