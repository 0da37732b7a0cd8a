"""Preparation of a filled, sharded model for DeepSpeed's engine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lowrank_dist.errors import ModelError
from lowrank_dist.layers.adapted import FoldAdapters, fuse_adapters
from lowrank_dist.layers.frozen import keep_decoded
from lowrank_dist.zero3.partition import Partitioner, reduce_by_layer, repeated_layers


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a model computes once it is filled.

    Parameters
    ----------
    gradient_checkpointing, use_reentrant, keep_decoded, fold_adapters, compile_layers
        See `lowrank_dist.PiSSAStrategy`.
    autocast
        Dtype of an autocast around the forward; None: no autocast. DeepSpeed's own autocast would not cover
        ``validate``, and it disables an outer one.
    """

    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    keep_decoded: bool = False
    fold_adapters: FoldAdapters = "never"
    compile_layers: str | None = None
    autocast: torch.dtype | None = None

    def check(self, backbone: PreTrainedModel) -> None:
        """Raise ModelError if `backbone` does not support these settings."""
        if self.gradient_checkpointing and not backbone.supports_gradient_checkpointing:
            raise ModelError(
                f"{type(backbone).__name__} does not support gradient checkpointing; pass gradient_checkpointing=False"
            )


def make_trainable(backbone: PreTrainedModel, computation: Computation, partitioner: Partitioner) -> None:
    """Set up how the partitioned `backbone` computes, in place. No communication."""
    if computation.gradient_checkpointing:
        options = {"use_reentrant": computation.use_reentrant}
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(options)
        else:  # the name before transformers 5.23
            backbone.gradient_checkpointing_enable(options)
    else:
        partitioner.save_no_views()
    fuse_adapters(backbone, computation.fold_adapters)
    if computation.compile_layers is not None:
        for layer in repeated_layers(backbone):
            # the function inside of the hooks, which gather and checkpoint; layers of one type share what is compiled
            layer.forward = torch.compile(layer.forward, backend=computation.compile_layers)
    elif computation.gradient_checkpointing and computation.keep_decoded:
        keep_decoded(backbone)
    if computation.autocast is not None:
        backbone.forward = torch.autocast(partitioner.device.type, dtype=computation.autocast)(backbone.forward)
    reduce_by_layer(backbone)
    _require_input_grads(backbone)


def _require_input_grads(backbone: PreTrainedModel) -> None:
    """Let embedded inputs require gradients, for `reduce_by_layer` and reentrant gradient checkpointing.

    As ``enable_input_require_grads`` does, and also where an embedding returns more than one tensor (Swin).
    """

    def require(_: nn.Module, args: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_(True)

    embeddings: dict[int, nn.Module] = {}
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            with suppress(NotImplementedError, AttributeError):  # towers without a known embedding
                found = module.get_input_embeddings()
                if isinstance(found, nn.Module):
                    embeddings[id(found)] = found
    for embedding in embeddings.values():
        embedding.register_forward_hook(require)
