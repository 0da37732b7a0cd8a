"""A filled, sharded model made ready for DeepSpeed's engine."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lowrank_dist.layers.folded import FoldAdapters, fold_adapters
from lowrank_dist.zero3.partition import gather_by_layer, register_used_parameters


def make_trainable(
    backbone: PreTrainedModel,
    *,
    gradient_checkpointing: bool,
    use_reentrant: bool,
    fold: FoldAdapters,
    autocast: torch.autocast | None,
) -> None:
    """Set up how `backbone` computes and is gathered, in place. Communicates nothing.

    Parameters
    ----------
    backbone
        Its parameters are partitioned.
    gradient_checkpointing, use_reentrant, fold
        See `lowrank_dist.PiSSAStrategy`.
    autocast
        Wraps the forward. The engine's own would not reach ``validate``, and it switches an outer one off.
    """
    if gradient_checkpointing:
        options = {"use_reentrant": use_reentrant}
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(options)
        else:  # its name before transformers 5.23
            backbone.gradient_checkpointing_enable(options)
    for layer in fold_adapters(backbone, fold):
        register_used_parameters(layer, layer.parameters())
    if autocast is not None:
        backbone.forward = autocast(backbone.forward)
    gather_by_layer(backbone)
    backbone.enable_input_require_grads()  # for gather_by_layer, and for reentrant checkpointing
