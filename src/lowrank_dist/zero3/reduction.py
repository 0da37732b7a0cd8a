"""Averages gradients of decoder layers over the ranks, in place of DeepSpeed's work on every parameter.

DeepSpeed copies every gradient into a bucket, and what a reduce-scatter returns into this rank's partition of the
parameter, with some ten calls of torch for each. Here the gradients of whole layers are brought into the order of the
partitions by one copy and averaged by one reduce-scatter. The partitions of a layer lie end to end in DeepSpeed's
flat tensor of gradients (two or three stretches if parameter groups have learning rates of their own), so that one more
copy ends it. DeepSpeed still reduces the gradients of other modules, and steps the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.zero3.partition import local_shard, whole_shape

_NORM_NUMEL = 2**22
"""Elements whose norm DeepSpeed takes at a time, for which it copies them to fp64."""


class LayerReduction:
    """Reduces the gradients of layers whose backward is done.

    Gradients wait until they fill a bucket of `reduce_bucket_size`: DeepSpeed's, unless it reduces gradients of other
    modules in it. Their reduction runs while further layers are computed.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3 for which `can_reduce` is true. It does not reduce
        its leaf modules any more.
    group
        The ranks over which trained parameters are partitioned.

    Attributes
    ----------
    at_the_end : sequence of Parameter
        Parameters that several layers share, whose gradients are complete when the backward ends.
    """

    def __init__(self, zero: Any, group: ShardGroup) -> None:
        self._zero, self._group = zero, group
        self._stretch: dict[nn.Parameter, tuple[int, int]] = {}  # of its partition in the flat tensor of gradients
        end = 0
        for parameter in chain.from_iterable(zero.fp16_groups):
            begin, end = end, end + local_shard(parameter).numel()
            self._stretch[parameter] = begin, end
        self.at_the_end: Sequence[nn.Parameter] = ()
        self._waiting: list[nn.Parameter] = []
        self._numel = 0
        self._running: tuple[Tensor, Any, list[nn.Parameter]] | None = None
        self._has_bucket = not zero._grad_acc_hooks  # of parameters that are not in layers
        for hook in zero._leaf_module_hooks:
            hook.remove()
        self._finish_of_deepspeed = zero.overlapping_partition_gradients_reduce_epilogue
        zero.overlapping_partition_gradients_reduce_epilogue = self._backward_ends

    @staticmethod
    def can_reduce(zero: Any) -> bool:
        """Whether it does what DeepSpeed would with these settings; not offloaded, quantized or whole gradients."""
        whole_or_quantized = not zero.reduce_scatter or zero.all2all_process_group is not None
        return not (whole_or_quantized or zero.offload_optimizer or zero.zenflow)

    def backward_begins(self) -> None:
        """Drop what a backward that failed has left."""
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting, self._numel = [], 0
        self._wait()

    def take(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of `parameters` over the ranks, now or later. One reduce-scatter for a full bucket.

        All ranks call it for the same layers in the same order. A missing gradient counts as zeros. Gradients of
        parameters that the optimizer does not have are dropped.
        """
        for parameter in parameters:
            if parameter not in self._stretch:
                parameter.grad = None
        parameters = [parameter for parameter in parameters if parameter in self._stretch]
        numel = sum(whole_shape(parameter).numel() for parameter in parameters)
        if self._waiting and self._numel + numel > self._zero.reduce_bucket_size:
            self._start()
        self._waiting += parameters
        self._numel += numel

    @torch.no_grad()
    def _start(self) -> None:
        self._finish()  # the bucket is used again
        parameters, ranks = sorted(self._waiting, key=self._stretch.__getitem__), self._group.size
        self._waiting, self._numel = [], 0
        dtype = self._zero.get_param_comm_dtype(parameters[0])
        gradients = []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros(whole_shape(parameter), dtype=dtype, device=parameter.device)
            gradients.append(gradient.view(-1) if gradient.dtype == dtype else gradient.view(-1).to(dtype))
            parameter.grad = None
        numel = sum(local_shard(parameter).numel() for parameter in parameters)
        whole = self._buffer(ranks * numel, gradients[0]).view(ranks, numel)
        torch._chunk_cat(gradients, 0, ranks, out=whole)
        if ranks > 1:
            whole.div_(ranks)
        mine, work = self._group.start_sum_rows(whole)
        self._running = mine, work, parameters

    def _buffer(self, numel: int, like: Tensor) -> Tensor:
        """DeepSpeed's bucket, or memory of its own, also for a layer that is larger, or if there is no bucket."""
        bucket = self._zero.ipg_buckets[like.dtype].buffer if self._has_bucket else None
        return like.new_empty(numel) if bucket is None or len(bucket) < numel else bucket[:numel]

    def _wait(self) -> tuple[Tensor, list[nn.Parameter]] | None:
        """This rank's part of the reduction that runs, and the parameters, in order, whose partitions it holds."""
        running, self._running = self._running, None
        if running is None:
            return None
        mine, work, parameters = running
        if work is not None:
            work.wait()
        return mine, parameters

    @torch.no_grad()
    def _finish(self) -> None:
        done = self._wait()
        if done is None:
            return
        mine, parameters = done
        every, first, start = self._zero.grad_partitions_flat_buffer, self._zero.micro_step_id == 0, 0
        for begin, end in self._stretches(parameters):
            into, part = every[begin:end], mine[start : start + end - begin]
            if first:
                into.copy_(part)
            else:
                into.add_(part)
            start += end - begin

    def _stretches(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[int, int]]:
        """Where the partitions of `parameters`, which are in order, lie in the flat tensor; neighbours together."""
        begin, end = self._stretch[parameters[0]]
        for parameter in parameters[1:]:
            start, stop = self._stretch[parameter]
            if start != end:
                yield begin, end
                begin = start
            end = stop
        yield begin, end

    def _backward_ends(self) -> None:
        """Reduce what waits; then let DeepSpeed do the same, and hand it this step's gradients in a few pieces."""
        self.take(self.at_the_end)
        if self._waiting:
            self._start()
        self._finish()
        self._finish_of_deepspeed()
        zero, start = self._zero, 0
        for index, parameters in enumerate(zero.fp16_groups):
            numel = sum(local_shard(parameter).numel() for parameter in parameters)
            pieces = zero.grad_partitions_flat_buffer[start : start + numel]
            # at most one for each parameter: DeepSpeed pairs them
            zero.averaged_gradients[index] = pieces.split(max(_NORM_NUMEL, -(-numel // len(parameters))))
            start += numel
