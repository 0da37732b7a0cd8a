"""What of the gathered tensors is alive, told by their storages: a buffer counts until whoever holds it lets go."""

from __future__ import annotations

import time
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
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
    """Gathered parameters of a module; as a context manager it looks after every gather of forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters: list[Any] = [p for p in module.parameters() if is_partitioned(p)]
        self._fetch = PartitionedParameterCoordinator.fetch_sub_module

    def __enter__(self) -> LiveMemory:
        fetch = self._fetch

        def fetch_and_look(coordinator: Any, *args: Any, **kwargs: Any) -> Any:
            result = fetch(coordinator, *args, **kwargs)
            self.look()
            return result

        PartitionedParameterCoordinator.fetch_sub_module = fetch_and_look
        return self

    def __exit__(self, *_: object) -> None:
        PartitionedParameterCoordinator.fetch_sub_module = self._fetch

    def current_bytes(self) -> int:
        for parameter in self._parameters:
            if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                self.watch(parameter.data)
        return super().current_bytes()
