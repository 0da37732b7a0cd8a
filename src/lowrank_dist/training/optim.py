"""Optimizers by name (AdamW, or a paged optimizer of bitsandbytes on CUDA) or by the import path of their class.

Paged optimizers keep their state in CUDA managed memory, which the driver moves to the host when the device runs out of
memory. On a CPU there is nothing to page, so that `torch.optim.AdamW` is used and one warning is logged.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lowrank_dist.training.projected import PROJECTIONS, check_projected, projecting_optimizer
from lowrank_dist.zero3.muon import muon

OptimizerName = Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "muon", "galore", "apollo"]
"""Names that `build_optimizer` knows; the first three are those of `transformers.TrainingArguments.optim`."""

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)

_PAGED_CLASS = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}

log = logging.getLogger(__name__)


def build_optimizer(
    params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer by its Hugging Face name, or by the import path of its class.

    Parameters
    ----------
    params
        Parameters to train, or parameter groups. They may be on another device than `device`.
    name
        ``"adamw"`` (`torch.optim.AdamW`), ``"paged_adamw_32bit"`` or ``"paged_adamw_8bit"`` (bitsandbytes; moments in
        float32, or in blockwise 8 bit), ``"muon"`` (DeepSpeed's, of matrices alone; `betas` and `eps` have no effect),
        ``"galore"`` or ``"apollo"`` (`lowrank_dist.training.projected`; `eps` is that of their classes), or an import
        path such as ``"torch.optim.Adagrad"``.
    lr
        Learning rate.
    weight_decay
        Weight decay of all parameters. Decoupled for the names; for a class by path, whatever the class makes of it.
    betas
        Decay rates of the running first and second moment. A class by path has its own.
    eps
        Term added to the square root of the second moment. A class by path has its own.
    options
        Further arguments of the optimizer's class, which go before `betas` and `eps`. Lists are passed as tuples.
    device
        Device of the training; by default CUDA if torch sees a CUDA device. On other devices the paged optimizers fall
        back to `torch.optim.AdamW`, and rank zero logs a warning with the reason.

    Returns
    -------
    torch.optim.Optimizer
        Optimizer without allocated state. The state takes 8 bytes per fp32 parameter for AdamW, about 2 for
        PagedAdamW8bit.

    Raises
    ------
    ValueError
        If `name` is unknown or leads to no optimizer, or its class does not take the arguments.
    ImportError
        If `name` is a paged optimizer, `device` is CUDA and bitsandbytes is missing.

    Notes
    -----
    Issues no collective. Under ZeRO-3 DeepSpeed replaces the given parameters by flat fp32 sub-groups, in which each
    rank's shares of many parameters are concatenated. Decisions of bitsandbytes per parameter therefore have no effect:
    overrides by `bitsandbytes.optim.GlobalOptimManager` match no parameter, and `min_8bit_size` (4096 elements) is
    compared with the size of a sub-group, so that small adapters are quantized too.
    """
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (options or {}).items()}
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in OPTIMIZERS:
        kind = optimizer_class(name)
        settings = {"lr": lr, **given}
        if weight_decay or "weight_decay" in inspect.signature(kind).parameters:
            settings["weight_decay"] = weight_decay
        return _made(kind, params, settings)
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **given}
    if name == "adamw":
        return _made(torch.optim.AdamW, params, settings)
    if name in PROJECTIONS:
        common = {"lr": lr, "weight_decay": weight_decay, "betas": betas}
        return projecting_optimizer(name, cast(Any, params), common, given)
    if name == "muon":
        return muon(params, {"lr": lr, "weight_decay": weight_decay, **given})
    if device.type != "cuda":
        _report(
            "optimizer=%s needs a CUDA device and this run trains on %s: torch.optim.AdamW is used instead, its state "
            "unpaged and in the dtype of the parameters",
            name,
            device.type,
        )
        return _made(torch.optim.AdamW, params, settings)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise ImportError(
            f"optimizer={name} needs bitsandbytes, which cannot be imported ({error}); run "
            "`pip install bitsandbytes`, or use optimizer=adamw"
        ) from error
    return _made(getattr(bitsandbytes.optim, _PAGED_CLASS[name]), params, settings)


def check_optimizer(name: str, options: Mapping[str, Any] | None) -> None:
    """Raise ValueError if `name` can be no optimizer, or `options` hold what has an option of its own.

    Nothing is imported.
    """
    if name not in OPTIMIZERS and "." not in name:
        raise ValueError(_unknown(name))
    for key in ("params", "lr", "weight_decay"):
        if key in (options or {}):
            raise ValueError(f"optimizer_options must not hold {key!r}, which has an option of its own")
    if name in PROJECTIONS:
        check_projected(name, options or {})


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class at an import path.

    Raises
    ------
    ValueError
        If there is none, or it is no `torch.optim.Optimizer`.
    """
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError(_unknown(path))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{_unknown(path)}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimizer={path!r} is no class derived from torch.optim.Optimizer")
    return found


def _unknown(name: str) -> str:
    return (
        f"optimizer={name!r} is not known; valid names: {', '.join(OPTIMIZERS)}, or the import path of a class, such "
        "as torch.optim.Adagrad"
    )


def _made(kind: type[torch.optim.Optimizer], params: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return kind(params, **settings)
    except TypeError as error:
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} does not take {', '.join(settings)}: {error}; its arguments are "
            f"{inspect.signature(kind)}"
        ) from error


@rank_zero_only
def _report(message: str, *values: object) -> None:
    log.warning(message, *values)
