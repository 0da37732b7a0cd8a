"""The loss of a causal language model without materialized logits, by liger-kernel.

Logits of a vocabulary of 128256 take 1 GB in fp32 per 2048 tokens, and their gradient another 1 GB. Liger's fused
linear cross-entropy multiplies by the head and computes the loss and its gradient in chunks of tokens, in the forward
pass. Only the gradient of the hidden states is kept. See P. Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
Training", 2024, section 3.2; arXiv:2410.10989.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError


class FusedLoss:
    """Makes a causal language model of transformers compute its loss from the hidden states.

    Parameters
    ----------
    model
        Causal language model. Its head must be a plain linear layer, whose output are the logits: neither scaled nor
        capped.

    Raises
    ------
    InputError
        If the head is not a plain linear layer (for instance because it has an adapter), or liger-kernel is missing.

    Notes
    -----
    The head is called once, as a module with ZeRO-3's hooks, which gather its weight for the forward and free it after.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise InputError(
                    "fused_cross_entropy: virtual tokens have no labels, which this loss would not know; set "
                    "fused_cross_entropy=False"
                )
            model = model.get_base_model()
        name = type(model).__name__
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise InputError(
                f"fused_cross_entropy: the head of {name} is {type(head).__name__}, and must be a plain linear layer; "
                "remove it from target_modules, or set fused_cross_entropy=False"
            )
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        except ImportError as error:
            raise InputError(
                f"fused_cross_entropy needs liger-kernel, which cannot be imported ({error}); run "
                "`pip install lowrank-dist[gpu]`, or set fused_cross_entropy=False"
            ) from error
        self._function = LigerFusedLinearCrossEntropyFunction
        self._model, self._head, self._name = model, head, name
        self._checked = False

    @contextmanager
    def of(self, labels: Tensor) -> Iterator[None]:
        """Inside, the loss of a forward with these labels, ``[batch, length]`` int64, is computed without logits.

        The loss is transformers' ``ForCausalLMLoss``: the mean over tokens whose next label is not -100. It is also in
        `logits` of the output.

        Raises
        ------
        InputError
            From the forward: if the device is not CUDA, or if the model changes the output of its head.
        """
        found: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            if hidden.shape[:-1] != labels.shape:  # not the batch: `PackedExamples` asks the model
                return nn.Linear.forward(self._head, hidden)
            targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten().to(hidden.device)
            found.append(self._loss(hidden.flatten(0, -2), targets))
            return found[-1]

        def loss_function(logits: Tensor, *_: Any, **__: Any) -> Tensor:
            if not self._checked:
                self._check(logits.detach(), found[-1].detach())
            return logits

        before = self._model.loss_function
        self._head.forward = forward  # type: ignore[assignment]
        self._model.loss_function = loss_function
        try:
            yield
        finally:
            del self._head.forward
            self._model.loss_function = before

    def _check(self, handed_on: Tensor, loss: Tensor) -> None:
        """Raise InputError if the model has changed the loss. A loss of 0 or NaN (no labels) proves nothing."""
        if not torch.equal(handed_on.nan_to_num(), loss.nan_to_num()):
            raise InputError(
                f"fused_cross_entropy: {self._name} scales or caps its logits, which this loss would ignore; "
                "set fused_cross_entropy=False"
            )
        self._checked = bool(loss.isfinite() & (loss != 0))

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(f"fused_cross_entropy needs a CUDA device, not {hidden.device}; set it to False")
        with torch.autocast(hidden.device.type, enabled=False):
            weight: Tensor = self._head.weight
            loss, *_ = self._function.apply(hidden.to(weight.dtype), weight, targets, None, self._head.bias)
        return loss
