"""GaLore and APOLLO: every parameter is trained, and the moments of matrices are those of projected gradients.

GaLore (Zhao et al., arXiv:2403.03507, algorithm 1) projects the gradient of a matrix on its leading singular vectors,
which are computed again every `update_proj_gap` steps, takes Adam's step there and projects it back. APOLLO (Zhu et
al., arXiv:2412.05270, algorithm 1) projects at random, and scales the whole gradient by what Adam would make of its
channels. Both are the optimizers of their authors (the packages ``galore-torch`` and ``apollo-torch``), and see whole
matrices: they go with Lightning's own strategies on one device or with DDP.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from lowrank_dist.errors import InputError

#: Options of the projection, with the values that the authors' examples have.
PROJECTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {
        "rank": 256,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    },
}


def check_projected(name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError if the rank of a projection is no positive number."""
    rank = options.get("rank", PROJECTIONS[name]["rank"])
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"optimizer={name}: optimizer_options.rank={rank!r} must be a positive number")


def allow_resuming(name: str) -> None:
    """Let torch load the projections in checkpoints, objects of a class of the package, without running other code."""
    with suppress(ImportError):  # said once training begins
        if name == "galore":
            from galore_torch.galore_projector import GaLoreProjector as Projector
        else:
            from apollo_torch.random_projector import GradientProjector as Projector
        torch.serialization.add_safe_globals([Projector])


def check_strategy(name: str, strategy: Strategy) -> None:
    """Raise ImportError if the package is missing, InputError if `strategy` gives an optimizer parts of matrices."""
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"optimizer={name} projects gradients of whole matrices, and trains the dense model, but "
            f"{type(strategy).__name__} gives an optimizer shards of them; use Lightning's DDPStrategy or one device "
            f"(configs/method/{name}.yaml), or optimizer=adamw"
        )
    _kind(name)


def projecting_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Make GaLore or APOLLO.

    Parameters
    ----------
    name
        ``"galore"`` or ``"apollo"``.
    groups
        Parameter groups from `lowrank_dist.training.parameter_groups.parameter_groups`. The matrices of the group
        ``other``, all but embeddings and heads, are projected; the rest takes plain AdamW.
    settings
        ``lr`` and ``weight_decay`` of groups without their own, and ``betas``.
    options
        Options of the projection (`PROJECTIONS`), and of the optimizer's class.

    Raises
    ------
    ImportError
        If the package is missing.
    InputError
        If no matrix is trained, or an option is unknown.
    """
    projection = {**PROJECTIONS[name], **{key: options[key] for key in PROJECTIONS[name] if key in options}}
    others = {key: value for key, value in options.items() if key not in projection}
    kind = _kind(name)
    unknown = sorted(set(others) - set(inspect.signature(kind).parameters))
    if unknown:
        raise InputError(
            f"optimizer={name} does not take {', '.join(unknown)}; it takes {', '.join(projection)}, betas, eps and "
            "correct_bias"
        )
    found: list[dict[str, Any]] = []
    for group in groups:
        matrices = [p for p in group["params"] if group["name"] == "other" and p.ndim == 2]
        rest = [p for p in group["params"] if not any(p is matrix for matrix in matrices)]
        found += [{**group, "params": rest}] if rest else []
        found += [{**group, **projection, "params": matrices, "name": "projected"}] if matrices else []
    projected = [group for group in found if group["name"] == "projected"]
    if not projected:
        raise InputError(f"optimizer={name} projects matrices, and the run trains none; use optimizer=adamw")
    made: torch.optim.Optimizer = kind(found, **{**settings, **others, "no_deprecation_warning": True})
    made.register_step_post_hook(_compact)
    return made


def _compact(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let go of the singular vectors that are not used.

    GaLore keeps views of the first ones, and with them the memory, and in checkpoints the bytes, of all: of a square
    matrix as many as the matrix has.
    """
    for state in optimizer.state.values():
        projector = state.get("projector")
        kept = getattr(projector, "ortho_matrix", None)
        if isinstance(kept, Tensor) and kept.untyped_storage().nbytes() > kept.nbytes:
            projector.ortho_matrix = kept.clone()


def _kind(name: str) -> Any:
    try:
        if name == "galore":
            from galore_torch import GaLoreAdamW

            return GaLoreAdamW
        from apollo_torch import APOLLOAdamW

        return APOLLOAdamW
    except ImportError as error:
        raise ImportError(
            f"optimizer={name} needs the package {name}-torch, which cannot be imported ({error}); run "
            "`pip install lowrank-dist[projected]`, or use optimizer=adamw"
        ) from error
