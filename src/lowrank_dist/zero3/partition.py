"""ZeRO-3 partitions written and read directly: the only module that names DeepSpeed's ``ds_*`` attributes.

``deepspeed.zero.Init`` partitions tensors that exist whole on a rank. Here no rank ever has a whole tensor: every
rank brings its own shard, and the attributes that ``zero.Init`` would set are set around it. These are private
names; ``tests/distributed/zero3/test_partition.py`` is the canary that fails when DeepSpeed changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition


class Partitioner:
    """Makes ZeRO-3 parameters out of local shards.

    Parameters
    ----------
    config
        DeepSpeed configuration; its ``zero_optimization`` section decides where partitions live
        (``offload_param``).
    replicas
        So many groups of consecutive ranks hold all frozen parameters each: the nodes, or 1.

    Attributes
    ----------
    group : ShardGroup
        All ranks: trained parameters are partitioned over them.
    frozen : ShardGroup
        The ranks over which frozen parameters are partitioned.
    device : torch.device
        Where shards are computed.
    """

    def __init__(self, config: dict[str, Any], *, replicas: int = 1) -> None:
        self._init = deepspeed.zero.Init(config_dict_or_path=config)
        # The plain F.linear keeps a view of every gathered frozen weight until its backward. DeepSpeed's own
        # (memory_efficient_linear, on by default) does not; it stays patched for the process, as with zero.Init.
        if self._init.mem_efficient_linear:
            self._init._enable_mem_efficient_linear()
        self.device = torch.device(self._init.local_device)
        self.group = ShardGroup(self._init.get_dp_process_group(), device=self.device)
        self.frozen = self.group.split(self.group.size // replicas)
        self._process_group = None if replicas == 1 else self.frozen.process_group

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
            Flat: this rank's ``ceil(numel / P)`` elements, or fewer where the rest is padding.
        requires_grad
            Whether it is trained.
        group
            The ranks that share it, P of them: `group` (by default) or `frozen` of this partitioner.
        """
        group = group or self.group
        partition = FlatPartition(numel=torch.Size(shape).numel(), world_size=group.size)
        if shard.dtype != dtype or shard.numel() > partition.shard_numel:
            raise ValueError(
                f"shard of {shard.numel()} {shard.dtype} elements does not fit a partition of "
                f"{partition.shard_numel} {dtype} elements"
            )
        offloaded = self._init.remote_device == "cpu"  # a string or one of DeepSpeed's string enums
        home = torch.device("cpu") if offloaded else self.device
        stored = torch.zeros(partition.shard_numel, dtype=dtype, device=home)
        if self._init.pin_memory and offloaded:
            stored = stored.pin_memory()
        stored[: shard.numel()] = shard

        parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=requires_grad)
        ds: Any = parameter
        if group is not self.group:
            ds.ds_zero_partition_process_group = self._process_group
        self._init._convert_to_deepspeed_param(parameter)
        ds.ds_shape = torch.Size(shape)
        ds.ds_numel = partition.numel
        ds.ds_numel_aligned = partition.shard_numel * partition.world_size
        ds.ds_tensor = stored
        ds.ds_tensor.ds_numel = partition.shard_numel
        ds.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        ds.ds_tensor.final_location = None
        ds.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return parameter


def use_cpu_accelerator() -> None:
    """Let DeepSpeed compute on the CPU, also where CUDA devices are present; call it before anything is partitioned.

    Also tells it to go without ``deepspeed_shm_comm``, an operator for inference that it would compile at start
    (minutes under load, and a killed build leaves a lock behind which later runs wait for ever).
    """
    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        deepspeed.accelerator.set_accelerator(CPU_Accelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_partitioned(parameter: Tensor) -> bool:
    """Whether `parameter` is a ZeRO-3 parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole tensor, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's flat partition, padding included."""
    return parameter.ds_tensor  # type: ignore[attr-defined]


def stored_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of this rank's partitions, padding included."""
    return sum(local_shard(p).untyped_storage().nbytes() for p in parameters)


def release(parameters: Iterable[Tensor]) -> None:
    """Give back the memory of partitioned parameters that are used no more.

    DeepSpeed's methods on a parameter refer to it: dropping it frees its partition only when cycles are collected.
    """
    for parameter in parameters:
        shard = local_shard(parameter)
        shard.data = shard.data.new_empty(0)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move buffers, and the emptied data of partitioned parameters, to `device`; partitions stay where they are.

    ``zero.Init`` creates buffers on the device, a skeleton has them on the CPU, and Lightning moves a module to the CPU
    after every run: DeepSpeed's single-parameter gathers would then follow the parameter's device there.
    """
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(device))
    for parameter in module.parameters():
        if is_partitioned(parameter) and parameter.numel() == 0:
            parameter.data = parameter.data.to(device)


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gather `parameters` on every rank; read-only inside. Collective: all ranks enter with the same parameters."""
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def repeated_layers(backbone: nn.Module) -> list[nn.Module]:
    """The decoder (or encoder) layers of `backbone`: the outermost modules that stand in a ``ModuleList``."""
    layers: list[nn.Module] = []
    stacks = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    for name, stack in stacks:
        if not any(name.startswith(f"{outer}.") for outer, _ in stacks):
            layers += stack
    return layers


def gather_by_layer(backbone: nn.Module) -> None:
    """Let ZeRO-3 gather and release decoder layers whole: one collective per dtype, not three per linear layer.

    DeepSpeed reduces the gradients of such a layer once the gradient of its input is there: the input of the first
    layer must want one (``enable_input_require_grads``), or they would be taken for missing.
    """
    for layer in repeated_layers(backbone):
        set_z3_leaf_module(layer, True)


def register_used_parameters(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Let ZeRO-3 gather `parameters` with `module`, whose forward uses them though they are not its own."""
    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def live_budget(backbone: nn.Module, layers: int) -> dict[str, int]:
    """DeepSpeed settings that bound gathered weights to about `layers` decoder layers ahead of their use.

    DeepSpeed's own defaults count elements and suppose 16-bit weights: a billion packed bytes hold two billion
    weights, and most of the model would stay gathered. Nothing is kept for reuse, and nothing is small enough to be
    kept for good.
    """
    sizes = [sum(whole_shape(p).numel() for p in layer.parameters()) for layer in repeated_layers(backbone)]
    layer = max(sizes, default=0)
    trainable = sum(whole_shape(p).numel() for p in backbone.parameters() if p.requires_grad)
    return {
        "stage3_max_live_parameters": layers * layer,
        "stage3_prefetch_bucket_size": layers * layer // 2,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": max(1, min(trainable, 50_000_000)),
    }
