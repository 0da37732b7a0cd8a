"""Loading of the parameters and buffers that are not decomposed: read unchanged, or newly initialised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.linalg import seed_from_name
from lowrank_dist.model.plan import PlannedTensor
from lowrank_dist.seeds import global_seed
from lowrank_dist.storage.reader import CheckpointReader, check_finite
from lowrank_dist.zero3.partition import Partitioner, whole_shape

_ROWS = 8192  # read at a time for a mean


class Loading:
    """Makes ZeRO-3 parameters of planned tensors, of which every rank reads its part.

    Parameters
    ----------
    backbone
        The model; its parameters are replaced.
    reader
        Reader of the pretrained weights.
    partitioner
        Makes the parameters: trained ones sharded over its `group`, others over its `frozen` group.
    compute_dtype, factor_dtype
        Dtype of frozen and of trained parameters.
    advance
        Called with the bytes of each tensor after it was loaded.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        reader: CheckpointReader,
        partitioner: Partitioner,
        *,
        compute_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        advance: Callable[[int], object],
    ) -> None:
        self.backbone, self.reader, self.partitioner = backbone, reader, partitioner
        self.group: ShardGroup = partitioner.group
        self.shared: ShardGroup = partitioner.frozen
        self.compute_dtype, self.factor_dtype, self.advance = compute_dtype, factor_dtype, advance

    def parameters(self, planned: Iterable[PlannedTensor], *, fp32_norms: bool = False) -> None:
        """Load parameters, a flat range per rank. With `fp32_norms`, normalisation layers compute in fp32."""
        norms = norm_modules(self.backbone) if fp32_norms and self.compute_dtype != torch.float32 else {}
        with self.group.shared_errors():
            for tensor in planned:
                owner, _, leaf = tensor.names[0].rpartition(".")
                parameter = getattr(self.backbone.get_submodule(owner), leaf)
                dtype = torch.float32 if owner in norms else self.compute_dtype
                if tensor.trainable:
                    dtype = self.factor_dtype
                shape = self.shape(tensor, parameter)
                partitioned = self.partitioner.parameter(
                    shape,
                    dtype,
                    self.flat_shard(tensor, shape, dtype),
                    requires_grad=tensor.trainable,
                    group=self.group if tensor.trainable else self.shared,
                )
                for name in tensor.names:
                    owner, _, leaf = name.rpartition(".")
                    setattr(self.backbone.get_submodule(owner), leaf, partitioned)
        for module in norms.values():
            compute_in_fp32(module, self.compute_dtype)

    def shape(self, tensor: PlannedTensor, parameter: Tensor) -> torch.Size:
        """Shape of a whole parameter, of which PEFT may have made an empty copy."""
        if tensor.key is None:
            return whole_shape(parameter)
        stored = self.reader.info(tensor.key).shape
        return torch.Size(stored if tensor.rows is None else (tensor.rows, *stored[1:]))

    def flat_shard(self, tensor: PlannedTensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """This rank's flat shard of a parameter, read or newly initialised, in `dtype`."""
        group = self.group if tensor.trainable else self.shared
        start, stop = FlatPartition(numel=shape.numel(), world_size=group.size).bounds(group.rank)
        if tensor.key is None:
            return self.fresh(tensor.names[0], shape).flatten()[start:stop].to(self.partitioner.device, dtype)
        stored = torch.Size(self.reader.info(tensor.key).shape).numel()
        shard = self.reader.flat(tensor.key, min(start, stored), min(stop, stored))
        check_finite(tensor.key, shard, start)
        self.advance(self.reader.info(tensor.key).nbytes)
        if shape.numel() > stored:
            mean = self.mean_row(tensor.key)
            more = mean.expand(-(-(shape.numel() - stored) // mean.numel()), *mean.shape).flatten()
            shard = torch.cat([shard.float(), more[max(start - stored, 0) : max(stop - stored, 0)]])
        return shard.to(self.partitioner.device, dtype)

    def mean_row(self, key: str) -> Tensor:
        """The mean row of a stored tensor in fp32: where new tokens start, as in transformers. One all-reduce."""
        rows, *row = self.reader.info(key).shape
        start, stop = FlatPartition(numel=rows, world_size=self.group.size).bounds(self.group.rank)
        total = torch.zeros(row, dtype=torch.float32)
        for low in range(start, stop, _ROWS):
            total += self.reader.rows(key, low, min(low + _ROWS, stop)).float().sum(0)
        total = total.to(self.partitioner.device)
        self.group.sum(total)
        return (total / rows).cpu()

    def fresh(self, name: str, shape: torch.Size) -> Tensor:
        """The initial value that transformers gives a parameter missing in the pretrained weights.

        It is the same on every rank. The seed is made of the name and of that of ``lightning.seed_everything``.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.backbone.get_submodule(owner)
        if not isinstance(module, nn.Linear):
            return self._initialized(owner, module, leaf, shape)
        if leaf == "bias":
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed_from_name(name, global_seed()))
        std = getattr(self.backbone.config, "initializer_range", 0.02)
        return torch.randn(shape, generator=generator) * std

    def _initialized(self, owner: str, module: nn.Module, leaf: str, shape: torch.Size) -> Tensor:
        """Parameter `leaf` of a module as the model that it belongs to initialises it."""
        whole = copy.copy(module)
        whole._parameters = {
            name: None if parameter is None else nn.Parameter(torch.zeros(whole_shape(parameter)), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
        model, inner = self.backbone, owner
        while inner:
            inner = inner.rpartition(".")[0]
            candidate = self.backbone.get_submodule(inner)
            if isinstance(candidate, PreTrainedModel):
                model = candidate
                break
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed_from_name(f"{owner}.{leaf}", global_seed()))
            model._init_weights(whole)
        value = whole._parameters[leaf]
        assert value is not None
        assert value.shape == shape
        return value.detach()

    def buffers(self, planned: Iterable[PlannedTensor]) -> None:
        """Load persistent buffers: rank 0 reads them, and they are replicated. Collective."""
        for tensor in planned:
            (name,), key = tensor.names, tensor.key
            buffer = self.backbone.get_buffer(name)
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.partitioner.device)

            def read(key: str = str(key), value: Tensor = value) -> Tensor:
                whole = self.reader.flat(key, 0, value.numel()).view(value.shape)
                self.advance(whole.nbytes)
                return whole.to(value)

            buffer.data = self.group.once(value, read)


def norm_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers by name: modules whose class name contains "Norm"."""
    return {name: module for name, module in backbone.named_modules() if "Norm" in type(module).__name__}


def compute_in_fp32(module: nn.Module, output_dtype: torch.dtype) -> None:
    """Cast the input of `module` to fp32 and its output to `output_dtype`, in place."""
    cast: Callable[..., Any] = lambda _, args: (args[0].float(), *args[1:])  # noqa: E731
    module.register_forward_pre_hook(cast)
    module.register_forward_hook(lambda _, args, output: output.to(output_dtype))
