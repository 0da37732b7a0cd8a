"""ZeRO-3 partitions written and read directly; the only module that uses DeepSpeed's ``ds_*`` attributes.

``deepspeed.zero.Init`` partitions tensors that exist whole on a rank. Here no rank ever has a whole tensor. Every rank
provides its own shard, and this module sets the attributes that ``zero.Init`` would set. They are private;
``tests/distributed/zero3/test_partition.py`` fails if DeepSpeed changes them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.partition_parameters import (
    InsertPostInitMethodToModuleSubClasses,
    PartitionedParamStatus,
    ZeroParamStatus,
)
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.overrides import has_torch_function

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition


class Partitioner:
    """Creates ZeRO-3 parameters from local shards.

    Parameters
    ----------
    config
        DeepSpeed configuration; ``offload_param`` of its ``zero_optimization`` section decides the device of
        partitions.

    Attributes
    ----------
    group : ShardGroup
        All ranks, over which trained parameters are partitioned.
    frozen : ShardGroup
        The ranks over which frozen parameters are partitioned: all, unless `replicate` is called.
    device : torch.device
        Where shards are computed.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._init = deepspeed.zero.Init(config_dict_or_path=config)
        self.device = torch.device(self._init.local_device)
        self.group = ShardGroup(self._init.get_dp_process_group(), device=self.device)
        self.frozen = self.group
        self._process_group: Any = None

    def replicate(self, copies: int) -> None:
        """Let `copies` groups of consecutive ranks each hold all frozen parameters. Call it before any is made.

        All ranks must call it, because it creates process groups.
        """
        if copies > 1:
            self.frozen = self.group.split(self.group.size // copies)
            self._process_group = self.frozen.process_group

    @property
    def holds_frozen_whole(self) -> bool:
        """Whether every rank holds all frozen parameters, where it computes."""
        return self.frozen.size == 1 and self._home.type == self.device.type

    @property
    def _home(self) -> torch.device:
        """Where shards lie between their uses."""
        offloaded = self._init.remote_device == "cpu"  # a str or a str enum of DeepSpeed
        return torch.device("cpu") if offloaded else self.device

    def group_of(self, parameter: Tensor) -> ShardGroup:
        """The ranks that share a parameter of this partitioner or of DeepSpeed."""
        return self.frozen if hasattr(parameter, "ds_zero_partition_process_group") else self.group

    def save_no_views(self) -> None:
        """Let ``F.linear`` save weights for backward as they are, unless the configuration says otherwise.

        It saves a view of the weight, which keeps the gathered weight until its backward. Under gradient checkpointing
        nothing is saved until then. DeepSpeed's ``memory_efficient_linear`` replaces it for the whole process, as in
        ``zero.Init``.
        """
        if self._init.mem_efficient_linear:
            self._init._enable_mem_efficient_linear()
            _leave_overridden_weights()

    def parameter(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        shard: Tensor,
        *,
        requires_grad: bool = False,
        group: ShardGroup | None = None,
    ) -> nn.Parameter:
        """A partitioned parameter of `shape` whose local shard is `shard`.

        Parameters
        ----------
        shape
            Shape of the whole tensor.
        dtype
            Dtype of the parameter; `shard` must have it.
        shard
            This rank's shard, flat: ``ceil(numel / P)`` elements, or fewer if the rest is padding. It is copied.
        requires_grad
            Whether the parameter is trained.
        group
            The P ranks that share the parameter: `group` (default) or `frozen` of this partitioner.

        Raises
        ------
        ValueError
            If `shard` has another dtype or is too long.
        """
        group = group or self.group
        parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=requires_grad)
        self._partition(parameter, torch.Size(shape), shard, group)
        return parameter

    def adopt(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Make a parameter that every rank holds whole a ZeRO-3 parameter of `dtype`, in place. One broadcast.

        Whatever refers to the parameter refers to the partitioned one. The values are those of rank 0.
        """
        whole = parameter.data.to(self.device).contiguous()
        self.group.broadcast(whole.view(-1).view(torch.uint8), source=0)
        start, stop = FlatPartition(numel=whole.numel(), world_size=self.group.size).bounds(self.group.rank)
        parameter.data = torch.empty(0, dtype=dtype, device=self.device)
        self._partition(parameter, whole.shape, whole.view(-1)[start:stop].to(dtype), self.group)

    def _partition(self, parameter: nn.Parameter, shape: torch.Size, shard: Tensor, group: ShardGroup) -> None:
        """Give an empty parameter its shape and this rank's shard."""
        dtype, partition = parameter.dtype, FlatPartition(numel=shape.numel(), world_size=group.size)
        if shard.dtype != dtype or shard.numel() > partition.shard_numel:
            raise ValueError(
                f"shard of {shard.numel()} {shard.dtype} elements does not fit a partition of "
                f"{partition.shard_numel} {dtype} elements"
            )
        stored = torch.zeros(partition.shard_numel, dtype=dtype, device=self._home)
        if self._init.pin_memory and self._home.type != self.device.type:
            stored = stored.pin_memory()
        stored[: shard.numel()] = shard

        ds: Any = parameter
        if group is not self.group:
            ds.ds_zero_partition_process_group = self._process_group
        self._init._convert_to_deepspeed_param(parameter)
        ds.ds_shape = shape
        ds.ds_numel = partition.numel
        ds.ds_numel_aligned = partition.shard_numel * partition.world_size
        ds.ds_tensor = stored
        ds.ds_tensor.ds_numel = partition.shard_numel
        ds.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        ds.ds_tensor.final_location = None
        ds.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _leave_overridden_weights() -> None:
    """Have DeepSpeed's ``F.linear`` pass by weights that multiply themselves (``__torch_function__``).

    Its autograd Function would compute with them, but their gradients would be lost.
    """
    plain, efficient = InsertPostInitMethodToModuleSubClasses.linear_bk, torch.nn.functional.linear
    if efficient is plain or hasattr(efficient, "__wrapped__"):
        return

    @functools.wraps(efficient)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        overridden = has_torch_function((input, weight, bias))
        return plain(input, weight, bias) if overridden else efficient(input, weight, bias)

    torch.nn.functional.linear = linear


def use_cpu_accelerator() -> None:
    """Make DeepSpeed compute on the CPU even if CUDA devices are present; call this before anything is partitioned.

    This also disables ``deepspeed_shm_comm``, an operator for inference that DeepSpeed would compile at start. The
    compilation takes minutes under load, and a killed one leaves a lock on which later runs wait forever. DeepSpeed
    would also start a process whenever it reduces gradients, to count the NUMA nodes; they are counted once, here.
    """
    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        deepspeed.accelerator.set_accelerator(CPU_Accelerator())
    os.environ.setdefault("LOCAL_SIZE", str(deepspeed.accelerator.get_accelerator().device_count()))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_partitioned(parameter: Tensor) -> bool:
    """Whether `parameter` is a ZeRO-3 parameter."""
    return hasattr(parameter, "ds_id")


def is_gathered(parameter: Tensor) -> bool:
    """Whether `parameter` holds its whole tensor: it is gathered, or not partitioned at all."""
    return not is_partitioned(parameter) or parameter.ds_status is ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole tensor, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextmanager
def shaped(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Give partitioned parameters their whole shape inside, without values or memory. No communication.

    All elements are one NaN (zero, if they are integers), so that code which reads values instead of shapes does not
    take them for weights.

    Parameters
    ----------
    parameters
        Parameters; those that are whole, or gathered, stay as they are.
    """
    empty = [p for p in parameters if is_partitioned(p) and p.shape != p.ds_shape]  # type: ignore[attr-defined]
    held = [parameter.data for parameter in empty]
    for parameter, data in zip(empty, held, strict=True):
        one = torch.full((), math.nan if data.is_floating_point() else 0, dtype=data.dtype, device=data.device)
        parameter.data = one.expand(whole_shape(parameter))
    try:
        yield
    finally:
        for parameter, data in zip(empty, held, strict=True):
            parameter.data = data


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's flat partition, padding included."""
    return parameter.ds_tensor  # type: ignore[attr-defined]


def set_whole(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter its gathered data, which is not copied."""
    parameter.data = whole
    parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def set_empty(parameter: Tensor) -> None:
    """Take its gathered data from a parameter."""
    parameter.data = _nothing(parameter.dtype, parameter.device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The data of parameters that are not gathered. Making it anew every time would cost as much as the rest."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


def stored_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of this rank's partitions, padding included."""
    return sum(local_shard(p).nbytes for p in parameters)


def release(parameters: Iterable[Tensor]) -> None:
    """Free the partitions of parameters that are no longer used.

    DeepSpeed's methods on a parameter form reference cycles with it. Without this call the partition would be freed
    only by garbage collection.
    """
    for parameter in parameters:
        shard = local_shard(parameter)
        shard.data = shard.data.new_empty(0)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move buffers, and the empty data of partitioned parameters, to `device`; partitions are not moved.

    ``zero.Init`` creates buffers on the device, but a skeleton has them on the CPU. Lightning moves a module to the CPU
    after every run, and DeepSpeed's gathers of single parameters would then gather to the CPU.
    """
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(device))
    for parameter in module.parameters():
        if is_partitioned(parameter) and parameter.numel() == 0:
            parameter.data = parameter.data.to(device)


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """All-gather `parameters` on every rank; read-only inside. Collective: all ranks pass the same parameters."""
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def repeated_layers(backbone: nn.Module) -> list[nn.Module]:
    """The decoder (or encoder) layers of `backbone`: the modules in its outermost module lists."""
    layers: list[nn.Module] = []
    stacks = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    for name, stack in stacks:
        if not any(name.startswith(f"{outer}.") for outer, _ in stacks):
            layers += stack
    return layers


def reduce_by_layer(backbone: nn.Module) -> None:
    """Make ZeRO-3 reduce the gradients of a decoder layer together, with one hook for the layer.

    DeepSpeed reduces them when the gradient of the layer's input is computed. Therefore the input of the first layer
    must require a gradient (``enable_input_require_grads``); otherwise the layer's gradients would be treated as
    missing.
    """
    for layer in repeated_layers(backbone):
        set_z3_leaf_module(layer, True)


def zero_settings(backbone: nn.Module) -> dict[str, int]:
    """DeepSpeed settings for `backbone`: no parameter stays gathered, and a bucket no larger than all gradients."""
    trainable = sum(whole_shape(p).numel() for p in backbone.parameters() if p.requires_grad)
    return {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": max(1, min(trainable, 50_000_000))}
