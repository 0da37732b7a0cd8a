"""Optimizers by name: AdamW, or a paged optimizer of bitsandbytes on CUDA.

Paged optimizers keep their state in CUDA managed memory, which the driver moves to the host when the device runs out of
memory. On a CPU there is nothing to page, so that `torch.optim.AdamW` is used and one warning is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

OptimizerName = Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"]
"""Names of `transformers.TrainingArguments.optim` that `build_optimizer` knows."""

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
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer by its Hugging Face name.

    Parameters
    ----------
    params
        Parameters to train, or parameter groups. They may be on another device than `device`.
    name
        ``"adamw"`` (`torch.optim.AdamW`), ``"paged_adamw_32bit"`` or ``"paged_adamw_8bit"`` (bitsandbytes; moments in
        float32, or in blockwise 8 bit).
    lr
        Learning rate.
    weight_decay
        Decoupled weight decay of all parameters.
    betas
        Decay rates of the running first and second moment.
    eps
        Term added to the square root of the second moment.
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
        If `name` is unknown.
    ImportError
        If `name` is a paged optimizer, `device` is CUDA and bitsandbytes is missing.

    Notes
    -----
    Issues no collective. Under ZeRO-3 DeepSpeed replaces the given parameters by flat fp32 sub-groups, in which each
    rank's shares of many parameters are concatenated. Decisions of bitsandbytes per parameter therefore have no effect:
    overrides by `bitsandbytes.optim.GlobalOptimManager` match no parameter, and `min_8bit_size` (4096 elements) is
    compared with the size of a sub-group, so that small adapters are quantized too.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known; valid names: {', '.join(OPTIMIZERS)}")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(params, **settings)
    if device.type != "cuda":
        _report(
            "optimizer=%s needs a CUDA device and this run trains on %s: torch.optim.AdamW is used instead, its state "
            "unpaged and in the dtype of the parameters",
            name,
            device.type,
        )
        return torch.optim.AdamW(params, **settings)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise ImportError(
            f"optimizer={name} needs bitsandbytes, which cannot be imported ({error}); run "
            "`pip install bitsandbytes`, or use optimizer=adamw"
        ) from error
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, _PAGED_CLASS[name])(params, **settings)
    return optimizer


@rank_zero_only
def _report(message: str, *values: object) -> None:
    log.warning(message, *values)
