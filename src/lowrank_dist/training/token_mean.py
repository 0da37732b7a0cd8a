"""The loss of a step as a mean over its trained tokens, whichever ranks and accumulated batches these are in.

The number of tokens of a step is known only with its last batch. So the gradients of the earlier batches are summed
with a provisional weight per token, and are rescaled once before the backward of the last batch. That batch has the
final weight, so that its backward leaves the gradient of the mean, before anything looks at it: hooks, clipping, or the
optimizer.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError

# Tokens of a step on one rank by which the sums of its earlier batches are divided until their number is known. Any
# number gives the same gradient up to rounding; this one keeps the sums near the magnitude of the gradient. It is a
# power of two, so that dividing by it does not round.
_PROVISIONAL = 1024.0


def trained_tokens(labels: Tensor) -> Tensor:
    """Number of tokens in `labels`, ``[batch, length]`` int64, that are predicted and trained on: int64 scalar."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def token_weight(labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weights, fp32 ``[batch, length]``, of the trained tokens in `labels`: fp32 scalar."""
    return (weights[:, 1:] * (labels[:, 1:] != IGNORE_INDEX)).sum()


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums over many losses: fp64, so that the sum does not depend on how it was split; MPS has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMean:
    """Weights the losses of the batches of a step so that their gradients sum up to that of the mean over tokens.

    Notes
    -----
    Let ``s`` be the sum of a batch's token losses, T the number of trained tokens of the step, W the number of ranks
    and N ``accumulate_grad_batches``. Strategies average gradients over ranks, and Lightning divides losses by N. The
    last batch of a step on every rank returns ``s W N / T``. Earlier ones return ``s N / c`` with a constant c, and
    their accumulated gradients are multiplied by ``c W / T``.

    Terms that a model adds to its mean loss (the load-balancing loss of a mixture of experts) are multiplied by the
    number of trained tokens of the batch with it. So they are averaged over the batches of the step by their tokens.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of the step so far: token losses, trained tokens

    def weighted(self, loss: Tensor, count: Tensor, trainer: Trainer, *, first: bool) -> tuple[Tensor, Tensor | None]:
        """Return the loss of a batch for backward, and the loss of the step if the batch ends it.

        The last batch of a step issues one all-reduce of two numbers. The host does not wait for the device.

        Parameters
        ----------
        loss
            Mean loss of this rank's batch, scalar. It may be NaN if `count` is 0.
        count
            Number of trained tokens of this rank's batch, or the sum of their weights, scalar. The mean may as well be
            one over pairs or examples.
        trainer
            The Trainer in whose ``training_step`` this is called.
        first
            Whether the batch begins a step.

        Returns
        -------
        weighted : Tensor
            Scalar of this rank, at least fp32. Its gradient is 0 if `count` is 0.
        mean : Tensor or None
            Mean loss over the trained tokens of the step, fp32 scalar, replicated; 0 if there are none. None if the
            batch does not end a step.

        Raises
        ------
        InputError
            If the batch is not the only one of its step and the gradients of the strategy cannot be rescaled.
        """
        loss = torch.where(count > 0, loss, 0.0)  # a mean over no tokens is 0 / 0
        dtype = accumulator_dtype(loss.device)
        sums = torch.stack([loss.detach().to(dtype) * count, count.to(dtype)])
        earlier = None if first else self._sums
        if earlier is not None:
            sums += earlier
        weight = count.to(torch.promote_types(loss.dtype, torch.float32)) * trainer.accumulate_grad_batches
        if trainer.fit_loop._should_accumulate():
            self._sums = sums
            return loss * (weight / _PROVISIONAL), None
        self._sums = None
        if trainer.world_size > 1:
            ShardGroup(device=loss.device).sum(sums)
        total, tokens = sums[0], torch.where(sums[1] > 0, sums[1], 1.0)
        scale = trainer.world_size / tokens
        if earlier is not None:
            _scale_gradients(scale * _PROVISIONAL, trainer)
        return loss * (weight * scale).to(weight.dtype), (total / tokens).float()


def check_accumulation(trainer: Trainer) -> None:
    """Raise InputError if the Trainer's strategy keeps accumulated gradients where they cannot be rescaled.

    They can be rescaled under strategies that keep them in ``parameter.grad`` (a single device, DDP), and under those
    with a method ``scale_gradients`` (`PiSSAStrategy`).
    """
    strategy = trainer.strategy
    in_place = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not in_place and not hasattr(strategy, "scale_gradients"):
        raise InputError(
            f"average_loss_over='tokens' with accumulate_grad_batches={trainer.accumulate_grad_batches} rescales the "
            f"accumulated gradients, which {type(strategy).__name__} keeps in a form of its own; use PiSSAStrategy, a "
            "single device or DDP, or set average_loss_over='batches' or accumulate_grad_batches=1"
        )


def _scale_gradients(factor: Tensor, trainer: Trainer) -> None:
    """Multiply the gradients that this rank holds by `factor`, a scalar that is equal on all ranks."""
    check_accumulation(trainer)
    scale = getattr(trainer.strategy, "scale_gradients", None)
    if scale is not None:
        scale(factor)
        return
    for parameter in trainer.lightning_module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))
