"""Memory of row blocks that is used again.

The C library hands large blocks back to the kernel as soon as they are freed, and gets their pages anew, one fault
each, for the next: on a virtual machine a tenth of the time in which a matrix is decomposed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 2**23  # elements: 32 MiB of fp32, from which on glibc never keeps freed memory (DEFAULT_MMAP_THRESHOLD_MAX)
_SPARE = 3  # buffers that are kept while nobody has them: a block in use, the next one, a residual


class Buffers:
    """Lends fp32 tensors on the CPU whose memory comes back by itself, once no tensor lies in it any more.

    Every buffer holds `numel` elements, of which only those that were ever lent take memory. May be shared by threads.

    Parameters
    ----------
    numel
        Of the largest tensor that is lent; larger ones are allocated like any other, and by default all.
    least
        Of the smallest tensor that is lent; memory of smaller ones is used again by the C library.
    """

    def __init__(self, numel: int = 0, *, least: int = _LEAST) -> None:
        self.numel, self.least = numel, least
        self._spare: list[Tensor] = []

    def empty(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """An uninitialized contiguous fp32 tensor of `shape`, in a buffer if it is on the CPU and large enough.

        Other devices have allocators of their own that keep what is freed.
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
