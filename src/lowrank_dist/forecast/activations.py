"""Memory that autograd keeps between forward and backward, measured by a forward pass on the meta device.

The shapes are those of the real model; nothing is computed. Parameters do not count, and each storage counts once. The
frozen layers of the real model save only parameters, like a plain linear layer with a frozen weight. Of repeated layers
that are alike two run: the first saves what all layers share too, such as rotary embeddings, and the second what the
others save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.experts import AdaptedParameter
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.zero3.partition import repeated_layers

#: Bytes that a decoder layer saves per token and hidden unit, in 16 bits, without the attention matrix: V. Korthikanti
#: et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, equation 1; arXiv:2205.05198.
_BYTES_PER_UNIT = 34


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that are kept until the backward.

    Attributes
    ----------
    inputs
        Inputs of the repeated layers, which gradient checkpointing keeps.
    layers
        Everything that each repeated layer saves, in order.
    outside
        Tensors saved outside the repeated layers, without logits and loss.
    logits
        Logits, their fp32 copy, the log-probabilities and the gradients of both, at the peak of the loss.
    fused
        The same for a loss in chunks (`lowrank_dist.training.fused_loss`): logits of a chunk, and the gradient of the
        hidden states.
    measured
        False if the architecture does not run on the meta device and `layers` is an estimate.
    """

    inputs: int
    layers: tuple[int, ...]
    outside: int
    logits: int
    fused: int
    measured: bool

    def times(self, batch_size: int) -> Activations:
        """Activations of a batch of `batch_size` sequences; all of them are proportional to it."""
        return Activations(
            inputs=batch_size * self.inputs,
            layers=tuple(batch_size * nbytes for nbytes in self.layers),
            outside=batch_size * self.outside,
            logits=batch_size * self.logits,
            fused=batch_size * self.fused,
            measured=self.measured,
        )


def measure_activations(backbone: PreTrainedModel, *, length: int, dtype: torch.dtype) -> Activations:
    """Activations of one sequence of `length` tokens, computed in `dtype`.

    Parameters
    ----------
    backbone
        Causal language model on the meta device, with injected adapters or with all parameters trainable. It is not
        modified.
    """
    text, layers = backbone.config.get_text_config(), repeated_layers(backbone)
    inputs = len(layers) * length * text.hidden_size * dtype.itemsize
    # bf16: 2 logits, 4 copy, 4 log-probabilities, 4 + 2 gradients; fp32 logits are their own copy
    per_logit = 12 if dtype == torch.float32 else 8 + 4 + 2 * dtype.itemsize
    logits = length * text.vocab_size * per_logit
    chunk = fused_chunk(length, text.hidden_size, text.vocab_size)
    fused = dtype.itemsize * (chunk * text.vocab_size + length * text.hidden_size) + 4 * length
    loss = {"logits": logits, "fused": fused}
    for alike in (_alike(layers), {}):  # a layer that others look into must run itself
        try:
            inside, outside = _Saved(backbone, dtype, alike).of(length)
            return Activations(inputs=inputs, layers=inside, outside=outside, **loss, measured=True)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, AttributeError):
            continue  # the forward needs values, which meta tensors lack, or other inputs
    estimate = _BYTES_PER_UNIT * length * text.hidden_size * dtype.itemsize // 2
    return Activations(inputs=inputs, layers=(estimate,) * len(layers), outside=0, **loss, measured=False)


def fused_chunk(tokens: int, hidden: int, vocabulary: int) -> int:
    """Tokens in a chunk of liger-kernel: its logits are as large as all hidden states, up to the next power of two."""
    chunks = -(-vocabulary // hidden)
    return min(tokens, 1 << (-(-tokens // chunks) - 1).bit_length())


def _alike(layers: list[nn.Module]) -> dict[int, int]:
    """Index of a layer that saves the same bytes, for all but the first two layers of a kind."""
    seen: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        seen.setdefault(_kind(layer), []).append(index)
    return {index: indices[1] for indices in seen.values() for index in indices[2:]}


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """All that tells layers apart: their modules with plain settings, and their tensors; not the layer's number."""
    modules = tuple(
        (name, type(module), *((key, repr(value)) for key, value in vars(module).items() if _is_setting(key, value)))
        for name, module in layer.named_modules()
    )
    tensors = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return modules, tensors


def _is_setting(key: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_setting("", part) for part in value)
    return isinstance(value, bool | int | float | str) and key != "layer_idx"


class _Stand(nn.Module):
    """Stands for a layer that is like another, and returns what that one returned, in tensors of its own."""

    def __init__(self, layer: nn.Module, returned: dict[int, Any], like: int) -> None:
        super().__init__()
        # not a sub-module: it is not copied, and not asked for parameters
        self.__dict__["layer"] = layer
        self.returned = returned
        self.like = like

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return tree_map_only(Tensor, _fresh, self.returned[self.like])


def _fresh(tensor: Tensor) -> Tensor:
    # a clone, since what follows may change it in place
    return torch.empty_like(tensor).requires_grad_(tensor.requires_grad).clone()


class _Saved:
    """Runs a copy of a model on the meta device and counts saved bytes by the layer that saves them.

    `alike` maps indices of layers to those of layers that save the same bytes; these layers do not run.
    """

    def __init__(self, backbone: PreTrainedModel, dtype: torch.dtype, alike: Mapping[int, int]) -> None:
        self.alike = alike
        self.returned: dict[int, Any] = {}
        originals = repeated_layers(backbone)
        stands = {id(originals[index]): _Stand(originals[index], self.returned, like) for index, like in alike.items()}
        self.model: Any = copy.deepcopy(backbone, stands)
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to("meta"))
        _encode_stacks(self.model, dtype)
        self.model.train()
        self.model.enable_input_require_grads()
        self.layers: list[nn.Module] = repeated_layers(self.model)
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.current: int | None = None
        self.kept: dict[int, Tensor] = {}
        self.bytes: dict[int | None, int] = {}

    def of(self, length: int) -> tuple[tuple[int, ...], int]:
        for index, layer in enumerate(self.layers):
            if index not in self.alike:
                layer.register_forward_pre_hook(self._enter(index))
                layer.register_forward_hook(self._leave(index))
        self.kept = {parameter.untyped_storage()._cdata: parameter for parameter in self.model.parameters()}
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        # a given 4-d mask is used as it is; transformers would read values to make one
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor), _FusedAttention():
            self.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        inside = (self.bytes.get(self.alike.get(index, index), 0) for index in range(len(self.layers)))
        return tuple(inside), self.bytes.get(None, 0)

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.current = index

        return hook

    def _leave(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.current = None
            self.returned[index] = output

        return hook

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        of_loss = self.current is None and tensor.ndim and tensor.shape[-1] == self.vocabulary
        if storage._cdata not in self.kept and not of_loss:
            self.kept[storage._cdata] = tensor  # keeps the storage alive, so that its address is not reused
            self.bytes[self.current] = self.bytes.get(self.current, 0) + storage.nbytes()
        return tensor


def _encode_stacks(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace PEFT's layers around parameters by those of a run, on meta; experts are multiplied in one product.

    The loop over experts (``eager``) needs values. It saves the same rows of inputs, expert by expert.
    """
    if "eager" in model.get_experts_implementation().values() and any(p.ndim == 3 for p in model.parameters()):
        model.set_experts_implementation("grouped_mm")
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    for name, layer in wrapped:
        (adapter,), weight = layer.active_adapters, layer.get_param()
        rows, columns = weight.shape[-2:]
        frozen = AdaptedParameter(
            RowPartition(rows=rows, columns=columns, world_size=1),
            Dense(dtype=dtype),
            compute_dtype=dtype,
            wrapper=layer,
            adapter=adapter,
            parameter=layer.parameter_name,
            experts=len(weight) if weight.ndim == 3 else None,
            input_first=weight.ndim == 3 and getattr(layer.get_base_layer(), "is_transposed", False),
        )
        frozen.weight_rows = nn.Parameter(weight.detach().flatten(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, frozen)


class _FusedAttention(TorchFunctionMode):
    """While active, scaled dot-product attention saves the tensors of its fused kernels, not the attention matrix."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # tokens before heads, as the kernels lay it out: the projection that follows needs no copy
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError("shapes only")
