"""What of the gathered tensors is alive, told by their storages: a buffer counts until whoever holds it lets go."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_dist.zero3.partition import is_partitioned

_SETTLING = 0.2  # s; for 28 ms at most, on a machine at work, gloo's threads were seen to hold what they had gathered


class LiveStorages:
    """Storages that were watched and are alive; the most bytes of them at one time."""

    def __init__(self) -> None:
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())

    def current_bytes(self) -> int:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._live.values())

    def look(self) -> None:
        """Raise the peak to what is alive now and remains so: a thread that is about to let go is waited for."""
        deadline = time.monotonic() + _SETTLING
        while (current := self.current_bytes()) > self.peak_bytes and time.monotonic() < deadline:
            time.sleep(0.001)
        self.peak_bytes = max(self.peak_bytes, current)


class LiveMemory(LiveStorages):
    """Gathered parameters of a module and what they are gathered into; as a context manager it looks at every gather.

    It looks when a gather begins, and when its parts are put together.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters: list[Any] = [p for p in module.parameters() if is_partitioned(p)]
        self._shards = {p.ds_tensor.untyped_storage().data_ptr() for p in self._parameters}
        self._real = dist.all_gather_into_tensor, torch.split_with_sizes_copy

    def __enter__(self) -> LiveMemory:
        gather, put_together = self._real

        def gather_and_look(every: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.watch(every)
            self.look()
            return gather(every, *args, **kwargs)

        def put_together_and_look(gathered: Tensor, *args: Any, out: list[Tensor], **kwargs: Any) -> Any:
            self.watch(out[0])
            self.look()
            return put_together(gathered, *args, out=out, **kwargs)

        dist.all_gather_into_tensor, torch.split_with_sizes_copy = gather_and_look, put_together_and_look
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather_into_tensor, torch.split_with_sizes_copy = self._real

    def current_bytes(self) -> int:
        for parameter in self._parameters:
            if parameter.data.untyped_storage().data_ptr() not in self._shards:  # of one rank, which gathers nothing
                self.watch(parameter.data)
        return super().current_bytes()
