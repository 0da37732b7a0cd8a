"""The exact LoRA: from an adapter for the residual to an ordinary one, of twice the rank, for the original model.

Let the trained model compute ``W_res + s B A`` with ``W_res = W - s B_0 A_0``, s the scaling and ``A_0, B_0`` the
factors before training. Then ::

    W_res + s B A = W + s (B A - B_0 A_0) = W + s [B | -B_0] [A; A_0],

a LoRA of rank 2r on W with the same scaling ([PiSSA], appendix on conversion; PEFT's
``path_initial_model_for_weight_conversion`` does the same). The scaling is ``alpha / r``, so alpha doubles with r; with
rsLoRA it is ``alpha / sqrt(r)`` and alpha grows by ``sqrt(2)``. Where the residual is quantized the model computes
``Q(W_res) + s B A``, and the identity leaves out ``Q(W_res) - W_res``, which the checkpoint's manifest records.

CPU tensors; no trainer, no process group.
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
        (``lora_embedding_A`` and ``_B`` of embeddings), and whole modules (``modules_to_save``), which are passed
        through.
    initial
        ``A_0`` and ``B_0`` under the same names.
    experts
        How many experts share a tensor, by name, where it is more than one; in PEFT's layout
        (`lowrank_dist.model.stacking`).

    Returns
    -------
    dict
        ``[2r, in]`` and ``[out, 2r]`` under the same names, same dtypes.

    Raises
    ------
    CheckpointError
        Where a factor has no counterpart in `initial` or another shape there.
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
                f"{name} {list(tensor.shape)}: its initial value {found}; adapter and adapter_init must be of one run"
            )
        if name.endswith(A_NAMES):
            converted[name] = concat_a([tensor, start], (experts or {}).get(name, 1))
        else:
            converted[name] = concat_b([tensor, -start])
    return converted


def lora_config(config: LoraConfig) -> LoraConfig:
    """PEFT configuration of the converted adapter: r doubled everywhere, the scaling of every module unchanged."""
    grow = math.sqrt(2) if config.use_rslora else 2
    return changed_config(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grow,
        rank_pattern={name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={name: alpha * grow for name, alpha in (config.alpha_pattern or {}).items()},
    )


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """What a pair of factors in an adapter file adapts.

    Attributes
    ----------
    name
        The layer in the model; the parameter, where PEFT adapts it without its layer (``target_parameters``).
    a, b
        Names of the factors in the file.
    rank
        Of the exact LoRA.
    scaling
        Of the product of its factors.
    experts
        How many matrices the factors are for; in the layout of `lowrank_dist.model.stacking`.
    """

    name: str
    a: str
    b: str
    rank: int
    scaling: float
    experts: int = 1

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices: `name`, or with the number of each expert in brackets."""
        return [self.name] if self.experts == 1 else [f"{self.name}[{expert}]" for expert in range(self.experts)]

    def split(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``[rank, in]`` and ``[out, rank]`` of every matrix, from ``[experts * rank, in], [out, rank * experts]``."""
        return list(zip(split_a(a, self.experts), split_b(b, self.experts), strict=True))

    def join(self, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `split` takes apart."""
        every_a, every_b = zip(*factors, strict=True)
        return join_a(every_a), join_b(every_b)


class ExactLora:
    """The LoRA for the original model that a checkpoint stands for, read module by module.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.

    Attributes
    ----------
    manifest : dict
        Of the checkpoint.
    config : peft.LoraConfig
        Of the exact LoRA.
    cancels : bool
        Its factors are ``[A; A_0]`` and ``[B | -B_0]``, not those of the adapter alone: two products, whose difference
        is much smaller than they are.
    trained : CheckpointReader
        Tensors of the trained adapter.
    modules : list of LoraModule
        What it adapts.
    scalings_known : bool
        False for a checkpoint that does not name the parameters its adapter is for, where ``alpha_pattern`` may mean
        some of them: the scaling of its modules is then a guess.

    Raises
    ------
    CheckpointError
        Where `checkpoint` is none, or its factors do not go together.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.manifest = read_manifest(checkpoint)
        self.trained, trained_config = open_adapter(checkpoint / ADAPTER_DIR)
        self.cancels = not self.manifest["starts_at_zero"]
        self.config, self._initial = trained_config, None
        if self.cancels:
            self.config = lora_config(trained_config)
            self._initial, _ = open_adapter(checkpoint / INITIAL_DIR)
        self.modules = [self._module(name, trained_config) for name in sorted(self.trained) if name.endswith(A_NAMES)]
        if not self.modules:
            raise CheckpointError(f"{checkpoint / ADAPTER_DIR}: holds no factors of a LoRA")
        ambiguous = trained_config.target_parameters and trained_config.alpha_pattern
        self.scalings_known = "parameters" in self.manifest or not ambiguous

    def _module(self, a: str, config: LoraConfig) -> LoraModule:
        suffix, b_suffix = next(pair for pair in zip(A_NAMES, B_NAMES, strict=True) if a.endswith(pair[0]))
        layer = a.removesuffix(suffix)
        b, experts = layer + b_suffix, self.manifest.get("experts", {}).get(a, 1)
        height, width = (self.trained.info(n).shape[d] if n in self.trained else 0 for n, d in ((a, 0), (b, 1)))
        if height != width or height % experts:
            raise CheckpointError(
                f"{a}: {height} rows, for {experts} matrices, do not go with {width} columns of {b}; the checkpoint is "
                "damaged"
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
        """The largest of its modules."""
        return max(module.rank for module in self.modules)

    @property
    def uniform(self) -> bool:
        """Whether all modules have one rank and one scaling."""
        return self.scalings_known and len({(module.rank, module.scaling) for module in self.modules}) == 1

    @property
    def whole(self) -> list[str]:
        """Names of tensors that are no factors (``modules_to_save``)."""
        factors = {name for module in self.modules for name in (module.a, module.b)}
        return [name for name in self.trained if name not in factors]

    def factors(self, module: LoraModule) -> tuple[Tensor, Tensor]:
        """A ``[experts * rank, in]`` and B ``[out, rank * experts]`` of `module`, in the dtype of the checkpoint.

        Raises
        ------
        CheckpointError
            Where they are not finite, or their initial values are of another run.
        """
        names = (module.a, module.b)
        factors = {name: whole_tensor(self.trained, name) for name in names}
        for name, tensor in factors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{name}: holds NaN or infinity: training has diverged; take an earlier checkpoint"
                )
        if self._initial is not None:
            initial = {name: whole_tensor(self._initial, name) for name in names if name in self._initial}
            factors = to_lora(factors, initial, dict.fromkeys(names, module.experts))
        return factors[module.a], factors[module.b]


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    """What PEFT multiplies the product of factors of `rank` by, in the module or parameter `name`."""
    from peft.utils.other import get_pattern_key

    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), name), config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
