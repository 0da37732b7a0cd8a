"""Losses of preference pairs, from log-probabilities of their responses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

PairLoss = Literal["dpo", "orpo", "simpo"]
"""Direct preference optimization (arXiv:2305.18290), odds ratio preference optimization (arXiv:2403.07691), simple
preference optimization (arXiv:2405.14734)."""
PAIR_LOSSES: tuple[str, ...] = get_args(PairLoss)

BETAS: dict[str, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0}
"""Values of beta from the papers (of lambda for ORPO), where none is given."""


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Losses of pairs, ``[pairs]``: equation 7 of arXiv:2305.18290, with the smoothing of conservative DPO.

    Parameters
    ----------
    chosen, rejected
        Log-probability of each response under the model minus that under the reference: fp32 ``[pairs]``.
    beta
        Strength of the pull to the reference.
    label_smoothing
        Probability that the labels of a pair are exchanged (E. Mitchell, "A note on DPO with noisy preferences").
    """
    return _sigmoid_loss(beta * (chosen - rejected), label_smoothing)


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Losses of pairs, ``[pairs]``: equation 6 of arXiv:2405.14734.

    Parameters
    ----------
    chosen, rejected
        Mean log-probability of the tokens of each response: fp32 ``[pairs]``.
    beta, gamma
        Scale of the rewards, and the margin by which the chosen one is to be ahead.
    label_smoothing
        As of `dpo`.
    """
    return _sigmoid_loss(beta * (chosen - rejected) - gamma, label_smoothing)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Losses of pairs, ``[pairs]``, without lambda and the loss of the chosen response: equation 7 of arXiv:2403.07691.

    Parameters
    ----------
    chosen, rejected
        Mean log-probability of the tokens of each response: fp32 ``[pairs]``, below 0.
    """
    return -functional.logsigmoid((chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected)))


def _log_of_rest(log_prob: Tensor) -> Tensor:
    """``log(1 - p)`` of ``log p``, exact near both ends; p = 1 is taken for the largest number below it."""
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    small = log_prob > -0.6931471805599453
    # `where` on both sides: the gradient of the branch that is not taken would be NaN
    near_one = torch.log(-torch.expm1(torch.where(small, log_prob, -0.1)))
    far = torch.log1p(-torch.exp(torch.where(small, -1.0, log_prob)))
    return torch.where(small, near_one, far)


def _sigmoid_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    loss = -functional.logsigmoid(margin)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * functional.logsigmoid(-margin)
