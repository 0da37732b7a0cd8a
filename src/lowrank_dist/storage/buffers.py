"""Reusable memory for row blocks.

The C library returns large blocks to the kernel as soon as they are freed, and the next block takes one page fault for
every page. On a virtual machine that is a tenth of the time of a decomposition.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 2**23  # elements: 32 MiB of fp32, from which on glibc never keeps freed memory (DEFAULT_MMAP_THRESHOLD_MAX)
_SPARE = 3  # unused buffers that are kept: for a block in use, the next block and a residual


class Buffers:
    """Pool of fp32 CPU buffers; the memory of a tensor returns to the pool once no tensor uses it.

    Every buffer has `numel` elements, and only those that were ever used take memory. Threads may share a pool.

    Parameters
    ----------
    numel
        Elements of the largest tensor from the pool; larger tensors are allocated as usual. By default all are.
    least
        Elements of the smallest tensor from the pool; the C library reuses the memory of smaller ones.
    """

    def __init__(self, numel: int = 0, *, least: int = _LEAST) -> None:
        self.numel, self.least = numel, least
        self._spare: list[Tensor] = []

    def empty(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return an uninitialized contiguous fp32 tensor of `shape`, from the pool if on the CPU and large enough.

        Allocators of other devices keep freed memory themselves.
        """
        numel = torch.Size(shape).numel()
        if device.type != "cpu" or not self.least <= numel <= self.numel:
            return torch.empty(tuple(shape), dtype=torch.float32, device=device)
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = torch.empty(self.numel)
        # The storage of the tensor keeps this array alive, whatever views there are of it.
        lent = buffer.numpy()[:numel]
        weakref.finalize(lent, self._take_back, buffer).atexit = False
        return torch.from_numpy(lent).view(tuple(shape))

    def _take_back(self, buffer: Tensor) -> None:
        if len(self._spare) < _SPARE:
            self._spare.append(buffer)
