"""Optimizers by name: AdamW, or the paged ones of bitsandbytes where there is a CUDA device to page from.

Paged optimizers keep their state in CUDA managed memory, which the driver moves to the host when the device is short of
memory. There is nothing to page on a CPU, so `torch.optim.AdamW` is used there, and one line says so.
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
        The parameters to train, or parameter groups. They may still be on another device than the one they will be
        trained on.
    name
        ``"adamw"`` (`torch.optim.AdamW`), ``"paged_adamw_32bit"`` or ``"paged_adamw_8bit"`` (bitsandbytes; moments in
        float32, or in blockwise 8 bit).
    lr
        Learning rate.
    weight_decay
        Decoupled weight decay, of every parameter given.
    betas
        Decay rates of the running first and second moment.
    eps
        Added to the root of the second moment.
    device
        Where the steps will be taken; by default CUDA where torch sees a CUDA device. On any other device the paged
        optimizers fall back to `torch.optim.AdamW`, and rank zero logs which optimizer is used and why.

    Returns
    -------
    torch.optim.Optimizer
        No state is allocated yet. AdamW holds 8 bytes for an fp32 parameter, PagedAdamW8bit about 2.

    Raises
    ------
    ValueError
        If `name` is not known.
    ImportError
        If a paged optimizer is asked for on CUDA and bitsandbytes is missing.

    Notes
    -----
    Issues no collective. Under ZeRO-3 the optimizer does not see the parameters it was given: DeepSpeed replaces them
    by flat fp32 sub-groups, each rank's share of many parameters laid end to end. What bitsandbytes decides for each
    parameter therefore means nothing there: overrides by `bitsandbytes.optim.GlobalOptimManager` match no parameter,
    and `min_8bit_size` (4096 elements) compares with the size of a sub-group, so small adapters are quantized too.
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
            f"optimizer={name} comes from bitsandbytes, which cannot be imported ({error}); "
            "`pip install bitsandbytes`, or use optimizer=adamw"
        ) from error
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, _PAGED_CLASS[name])(params, **settings)
    return optimizer


@rank_zero_only
def _report(message: str, *values: object) -> None:
    log.warning(message, *values)
