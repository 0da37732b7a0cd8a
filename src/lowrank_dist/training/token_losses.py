"""Log-probabilities of tokens from logits, where a loss is no plain mean over them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from lowrank_dist.data.tokenizing import IGNORE_INDEX


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of labels: fp32 ``[batch, length - 1]``, 0 where the next label is -100.

    Parameters
    ----------
    logits
        ``[batch, length, vocabulary]``, any floating dtype; cast to fp32 as transformers does for its loss.
    labels
        int64 ``[batch, length]``.
    """
    targets = labels[:, 1:]
    flat = logits[:, :-1].flatten(0, 1).float()
    losses = functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.view(targets.shape)


def router_loss(model: Any, output: Any) -> Tensor | float:
    """What transformers adds to the loss of a mixture of experts whose configuration asks for it; else 0."""
    router = getattr(output, "aux_loss", None)
    if not isinstance(router, Tensor):
        return 0.0
    return float(model.config.router_aux_loss_coef) * router.to(output.logits.device)
