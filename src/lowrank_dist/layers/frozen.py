"""Layers over an encoded, row-sharded, frozen weight: `FrozenLinear`, one autograd Function, and `FrozenEmbedding`.

The linear layer saves nothing of its weight for backward: it decodes it again, from the parameters that ZeRO-3 has
gathered again by then. Saving a decoded copy, or a view of the stored bytes, would keep every layer's weights until its
backward. Under gradient checkpointing there is a third decoding, in the recomputation, shortly before the backward: its
result may be kept in between (`FrozenLinear.keeps_decoded`), for the memory of one dense decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.lazy_weight import LazyWeight
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import Product, ResidualFormat
from lowrank_dist.zero3.backward import in_backward
from lowrank_dist.zero3.partition import gathered, is_gathered


class _FrozenLinearFunction(torch.autograd.Function):
    """``x W^T`` (or ``x W`` where rows are inputs) for a frozen encoded W; only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        stored = layer.stored()
        if not isinstance(stored[0], nn.Parameter):  # whole tensors in their place, which are gone in backward
            ctx.save_for_backward(*stored)
        return x @ layer.used(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer, stored = ctx.layer, ctx.saved_tensors  # asked for once: gradient checkpointing recomputes them
        weight = layer.recomputed(grad.dtype)
        if weight is None:
            weight = layer.matrix(grad.dtype, stored=layer.by_name(stored) if stored else None)
        return grad @ weight.mT, None


@dataclass(eq=False)
class _Kept:
    """A weight decoded in a recomputation; an object, since attributes of modules are slow to set."""

    weight: Tensor | None = None


class FrozenWeight(nn.Module):
    """A frozen, encoded matrix.

    The parameters that the residual format names are None at first. The walk registers them, one flat tensor each.

    Parameters
    ----------
    partition
        Shape of the stored matrix and its sharding.
    residual
        How the matrix is encoded.
    compute_dtype
        Dtype in which it is decoded for use.
    """

    def __init__(self, partition: RowPartition, residual: ResidualFormat, *, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # of a FrozenLinear, nn.Linear would make a dense weight
        self.partition, self.residual, self.compute_dtype = partition, residual, compute_dtype
        self.stored_names = tuple(residual.storages(partition))
        for name in self.stored_names:
            self.register_parameter(name, None)

    def stored(self) -> list[Tensor]:
        """The parameters that hold the encoded weight."""
        return [self._parameters[name] for name in self.stored_names]  # type: ignore[misc]

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype, product: Product | None = None) -> Tensor:
        """Decode the matrix as stored, in `dtype`, from its gathered storages, and add `product` if given.

        See `lowrank_dist.quantization.format.ResidualFormat.decode`.
        """
        return self.residual.decode(self.by_name(stored), self.partition, dtype, product)

    def by_name(self, stored: Sequence[Tensor]) -> dict[str, Tensor]:
        """The storages by their names in the residual format."""
        return dict(zip(self.stored_names, stored, strict=True))

    def extra_repr(self) -> str:
        return f"rows={self.partition.rows}, columns={self.partition.columns}, residual={self.residual}"


class FrozenLinear(FrozenWeight, nn.Linear):
    """Linear layer whose weight is a frozen, encoded residual.

    It replaces linear layers of the model, or the ``base_layer`` of a PEFT ``lora.Linear``. It is an ``nn.Linear``, so
    that models and PEFT's tuners take it for the layer that it replaces, GPT-2's Conv1D too.

    Parameters
    ----------
    partition
        Shape of the stored matrix and its sharding: ``[out, in]``, or ``[in, out]`` with `input_first`.
    residual
        How the matrix is encoded.
    compute_dtype
        Inputs are cast to this dtype and outputs have it. Autocast overrides it where enabled.
    input_first
        The stored matrix is ``[in, out]`` (GPT-2's Conv1D).

    Attributes
    ----------
    keeps_decoded : bool
        Whether the weight that gradient checkpointing decodes in a recomputation is kept until the backward.
    is_plain : bool
        Whether the layer multiplies as an ``nn.Linear`` does, whose weight autograd saves: this rank holds it whole,
        as it is used, so that nothing is decoded, and nothing kept that would not stay.
    """

    bias: Any

    def __init__(
        self,
        partition: RowPartition,
        residual: ResidualFormat,
        *,
        compute_dtype: torch.dtype,
        input_first: bool = False,
    ) -> None:
        super().__init__(partition, residual, compute_dtype=compute_dtype)
        self.input_first = input_first
        self.out_features, self.in_features = partition.rows, partition.columns
        if input_first:
            self.in_features, self.out_features = self.out_features, self.in_features
        self.register_parameter("bias", None)
        self.keeps_decoded = self.is_plain = False
        self._kept = _Kept()

    @property
    def weight(self) -> LazyWeight:  # type: ignore[override]
        """The weight ``[out, in]`` in the compute dtype; whatever computes with it decodes it (`LazyWeight`)."""
        shape, device = (self.out_features, self.in_features), self.stored()[0].device
        return LazyWeight(self.dense, shape, dtype=self.compute_dtype, device=device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out, in]``, decoded in `dtype`; it may be a view of the stored values.

        Outside the forward and the backward of the layer, its shards are gathered for it. That is collective, so all
        ranks must ask together.
        """
        stored = self.stored()
        if all(map(is_gathered, stored)):
            return self.matrix(dtype).mT
        with gathered(stored):
            return self.matrix(dtype).mT.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` of any floating dtype to ``[..., out]`` in the compute dtype."""
        if self.is_plain and x.dtype == self.compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return self.biased(x @ self.matrix(x.dtype))
        return self.multiplied(x, _FrozenLinearFunction, self)

    def matrix(
        self, dtype: torch.dtype, product: Product | None = None, *, stored: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The weight, decoded to ``[in, out]`` for ``x @ matrix``; a view where rows are outputs.

        `product` is added, in the orientation of the stored matrix. It is decoded from `stored`, by default from what
        the layer holds.
        """
        held: Any = self._parameters if stored is None else stored
        weight = self.residual.decode(held, self.partition, dtype, product)
        return weight if self.input_first else weight.mT

    def used(self, dtype: torch.dtype, product: Product | None = None) -> Tensor:
        """`matrix` for a forward, which keeps it if the layer does and the forward is a recomputation."""
        weight = self.matrix(dtype, product)
        if self.keeps_decoded:
            self._kept.weight = weight if in_backward() else None
        return weight

    def recomputed(self, dtype: torch.dtype) -> Tensor | None:
        """What the last forward kept, once, if it is in `dtype`."""
        if not self.keeps_decoded:
            return None
        weight, self._kept.weight = self._kept.weight, None
        return None if weight is None or weight.dtype != dtype else weight

    def multiplied(self, x: Tensor, function: type[torch.autograd.Function], *args: Any) -> Tensor:
        """Apply `function` to x in the compute dtype, or that of autocast where enabled, and add the bias."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                y = function.apply(x, *args)
        else:
            y = function.apply(x if x.dtype == self.compute_dtype else x.to(self.compute_dtype), *args)
        return self.biased(y)

    def biased(self, y: Tensor) -> Tensor:
        """`y` with the bias, if there is one."""
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, residual={self.residual}"


def keep_decoded(backbone: nn.Module) -> None:
    """Keep what recomputations of `backbone` decode until the backward (`FrozenLinear.keeps_decoded`)."""
    for module in backbone.modules():
        if isinstance(module, FrozenLinear):
            module.keeps_decoded = True


def multiply_plainly(backbone: nn.Module) -> None:
    """Let layers multiply plainly whose weights, which this rank holds whole, are stored as they are used.

    See `FrozenLinear.is_plain`.
    """
    for module in backbone.modules():
        if isinstance(module, FrozenLinear):
            residual = module.residual
            module.is_plain = isinstance(residual, Dense) and residual.dtype == module.compute_dtype


class FrozenEmbedding(FrozenWeight):
    """Embedding whose table ``[num_embeddings, embedding_dim]`` is a frozen, encoded residual.

    It replaces the ``base_layer`` of a PEFT ``lora.Embedding``. It decodes the rows that it looks up and saves nothing
    for backward, because no gradient reaches it.

    Parameters
    ----------
    partition, residual
        See `FrozenWeight`.
    compute_dtype
        Dtype of the output.
    replaced
        The embedding that it replaces: a plain one, or one that multiplies its output by ``embed_scale``.
    """

    def __init__(
        self, partition: RowPartition, residual: ResidualFormat, *, compute_dtype: torch.dtype, replaced: nn.Embedding
    ) -> None:
        super().__init__(partition, residual, compute_dtype=compute_dtype)
        self.num_embeddings, self.embedding_dim = partition.rows, partition.columns
        self.embed_scale: Tensor | None
        # PEFT's layer passes these to the lookup in A.
        self.padding_idx, self.norm_type = replaced.padding_idx, replaced.norm_type
        self.max_norm, self.scale_grad_by_freq, self.sparse = None, False, False
        scale = getattr(replaced, "embed_scale", None)
        if scale is not None:  # PEFT reads it, and does not access the weight if it is a tensor
            scale = scale.detach() if isinstance(scale, Tensor) else torch.tensor(float(scale))
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``[...]`` integer ids to ``[..., embedding_dim]`` in the compute dtype."""
        with torch.no_grad():
            rows = self.residual.decode_rows(
                self.by_name(self.stored()), self.partition, ids.flatten().long(), self.compute_dtype
            ).view(*ids.shape, self.embedding_dim)
            return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


class ExtendedLinear(nn.Module):
    """``x f(B)^T``: takes the place of PEFT's ``lora_B`` where the layout has parameters beside A and B.

    Parameters
    ----------
    layout
        What f is.
    weight
        B, ``[out, r]``, partitioned.
    further
        The further parameters of `layout`, partitioned; they become parameters of the module under their names.
    """

    def __init__(self, layout: FactorLayout, weight: nn.Parameter, further: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.layout, self.weight = layout, weight
        for name, parameter in further.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.multiply(x, self.weight, {name: getattr(self, name) for name in self.layout.further})
