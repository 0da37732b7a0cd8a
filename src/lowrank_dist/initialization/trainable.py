"""Preparation of a filled, sharded model for DeepSpeed's engine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from lowrank_dist.errors import ModelError
from lowrank_dist.layers.adapted import FoldAdapters, fuse_adapters
from lowrank_dist.layers.experts import bound_experts
from lowrank_dist.layers.frozen import keep_decoded, multiply_plainly
from lowrank_dist.zero3.backward import started
from lowrank_dist.zero3.partition import Partitioner, reduce_by_layer, repeated_layers


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a model computes once it is filled.

    Parameters
    ----------
    gradient_checkpointing, use_reentrant, keep_decoded, fold_adapters, compile_layers, experts_at_a_time
        See `lowrank_dist.PiSSAStrategy`.
    autocast
        Dtype of an autocast around the forward; None: no autocast. DeepSpeed's own autocast would not cover
        ``validate``, and it disables an outer one.
    backward
        Whether there will be backward passes. Without, no engine of DeepSpeed is needed either.
    """

    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    keep_decoded: bool = False
    fold_adapters: FoldAdapters = "never"
    compile_layers: str | None = None
    experts_at_a_time: int | None = None
    autocast: torch.dtype | None = None
    backward: bool = True

    def check(self, backbone: PreTrainedModel) -> None:
        """Raise ModelError if `backbone` does not support these settings."""
        if self.gradient_checkpointing and not backbone.supports_gradient_checkpointing:
            raise ModelError(
                f"{type(backbone).__name__} does not support gradient checkpointing; pass gradient_checkpointing=False"
            )
        if self.experts_at_a_time is not None and self.experts_at_a_time < 1:
            raise ModelError(f"experts_at_a_time={self.experts_at_a_time} must be at least 1")


def make_trainable(backbone: PreTrainedModel, computation: Computation, partitioner: Partitioner) -> list[str]:
    """Set up how the partitioned `backbone` computes, in place. No communication.

    Returns
    -------
    list of str
        What the user should know of it, a line each.
    """
    if computation.gradient_checkpointing:
        options = {"use_reentrant": computation.use_reentrant}
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(options)
        else:  # the name before transformers 5.23
            backbone.gradient_checkpointing_enable(options)
    elif computation.backward:
        partitioner.save_no_views()
    fuse_adapters(backbone, computation.fold_adapters)
    said = bound_experts(backbone, computation.experts_at_a_time)
    if computation.compile_layers is not None:
        for layer in repeated_layers(backbone):
            # the function inside of the hooks, which gather and checkpoint; layers of one type share what is compiled
            layer.forward = torch.compile(layer.forward, backend=computation.compile_layers)
    elif computation.gradient_checkpointing and computation.keep_decoded:
        keep_decoded(backbone)
    if partitioner.holds_frozen_whole:
        multiply_plainly(backbone)
    if computation.autocast is not None:
        backbone.forward = torch.autocast(partitioner.device.type, dtype=computation.autocast)(backbone.forward)
    if not computation.backward:
        return said
    reduce_by_layer(backbone)
    _require_input_grads(backbone)
    return said


def _require_input_grads(backbone: PreTrainedModel) -> None:
    """Let embedded inputs require gradients, for `reduce_by_layer` and reentrant gradient checkpointing.

    As ``enable_input_require_grads`` does, and also where an embedding returns more than one tensor (Swin), or where
    the model changes in place what it returns (CTRL), which autograd forbids for a leaf.
    """

    def require(_: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(Tensor, _requiring_grad, output) if torch.is_grad_enabled() else output

    embeddings: dict[int, nn.Module] = {}
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            with suppress(NotImplementedError, AttributeError):  # towers without a known embedding
                found = module.get_input_embeddings()
                if isinstance(found, nn.Module):
                    embeddings[id(found)] = found
    for embedding in embeddings.values():
        embedding.register_forward_hook(require)


def _requiring_grad(tensor: Tensor) -> Tensor:
    """`tensor`, or the start of a graph, if it is a leaf of floating-point numbers."""
    # also if it requires gradients already, since transformers has a hook that lets leaves do so
    return started(tensor) if tensor.is_leaf and tensor.is_floating_point() else tensor
