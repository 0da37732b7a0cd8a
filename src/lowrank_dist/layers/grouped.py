"""Products of rows with the matrices of a stack, where the rows of one expert follow each other.

`Rows` says which rows belong to which expert, and makes groups of experts whose matrices are decoded together. On CUDA
a group is one ``torch.nn.functional.grouped_mm``, elsewhere a loop over its experts. The host needs to know where
the rows of a group begin. These numbers are copied to it once per layer and pass, without waiting for anything that the
device does later, and are kept for the backward. Where all experts are one group, the host needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 8  # elements of 2 bytes: grouped_mm takes rows that begin at multiples of 16 bytes


class Rows:
    """The rows ``[n, k]`` of a batch, sorted by expert.

    Parameters
    ----------
    ends
        ``[experts]`` int32: the row after the last one of every expert, on the device of the rows. None: see `on_host`.
    on_host
        The same numbers, if the host knows them.
    """

    def __init__(self, ends: Tensor | None, on_host: Sequence[int] | None = None) -> None:
        self.ends = ends
        self._on_host = None if on_host is None else list(on_host)
        self._copy: Tensor | None = None
        self._copied: Any = None
        if on_host is None and ends is not None and ends.is_cuda:
            self._copy = torch.empty_like(ends, device="cpu", pin_memory=True).copy_(ends, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @classmethod
    def until(cls, ends: Tensor) -> Rows:
        """The rows of a call of ``grouped_mm(..., offs=ends)``; the calls of one forward share them."""
        found = getattr(ends, "_rows", None)
        if found is None:
            found = ends._rows = cls(ends)  # type: ignore[attr-defined]
        return found

    @classmethod
    def of_one(cls, expert: int, rows: int, experts: int) -> Rows:
        """All rows belong to one expert."""
        return cls(None, [0] * expert + [rows] * (experts - expert))

    @classmethod
    def even(cls, each: int, experts: int) -> Rows:
        """Every expert has the same number of rows."""
        return cls(None, [each * (expert + 1) for expert in range(experts)])

    def on_host(self) -> list[int]:
        """`ends` on the host, which waits until they have been computed."""
        if self._on_host is None:
            assert self.ends is not None
            if self._copy is None:
                self._on_host = self.ends.tolist()
            else:
                self._copied.synchronize()
                self._on_host, self._copy = self._copy.tolist(), None
        return self._on_host

    def groups(self, size: int) -> Iterator[Group]:
        """The experts that have rows, in order, `size` at a time (the last ones fewer)."""
        ends = self.on_host()
        starts = [0, *ends[:-1]]
        used = [expert for expert, end in enumerate(ends) if end > starts[expert]]
        for first in range(0, len(used), size):
            experts = used[first : first + size]
            start = starts[experts[0]]
            yield Group(self, experts, start, [ends[expert] - start for expert in experts])

    def as_one(self, experts: int) -> Group:
        """All experts as one group, whose rows the host does not know."""
        assert self.ends is not None
        return Group(self, range(experts), 0, None)


class Group:
    """Some experts and their rows.

    Attributes
    ----------
    experts
        Their indices, ascending.
    start, stop
        Their first row and the row after the last one; `stop` is None if the host does not know it.
    """

    def __init__(self, rows: Rows, experts: Sequence[int], start: int, ends: list[int] | None) -> None:
        self.experts, self.start, self._of, self._ends = experts, start, rows, ends
        self.stop = None if ends is None else start + ends[-1]
        self._index: Tensor | None = None

    @classmethod
    def of(cls, experts: Sequence[int]) -> Group:
        """Some experts, ascending, whose rows do not matter."""
        return cls(Rows(None, []), experts, 0, None)

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)

    @property
    def consecutive(self) -> bool:
        """Whether the experts are a range."""
        return self.experts[-1] - self.experts[0] == len(self.experts) - 1

    def of_all(self, device: torch.device) -> slice | Tensor:
        """What picks the experts of the group from a tensor of all, on `device`."""
        if self.consecutive:
            return slice(self.experts[0], self.experts[-1] + 1)
        if self._index is None or self._index.device != device:
            self._index = _on_device(self.experts, torch.int64, device)
        return self._index

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Place in the group and rows, counted from `start`, of every expert."""
        assert self._ends is not None
        for place, (start, stop) in enumerate(pairwise([0, *self._ends])):
            yield place, slice(start, stop)

    def ends(self, device: torch.device) -> Tensor:
        """``[experts of the group]`` int32: the row after the last one of each, counted from `start`."""
        whole = self._of.ends
        if self._ends is None:
            assert whole is not None
            return whole
        if whole is not None and whole.device == device and self.consecutive:
            ends = whole[self.experts[0] : self.experts[-1] + 1]
            return ends - self.start if self.start else ends
        return _on_device(self._ends, torch.int32, device)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``[n, m]``: the rows of every expert, of ``[n, k]`` in all, times its matrix, of ``[experts, k, m]``."""
        if has_grouped_mm(x, *matrices.shape[1:]):
            return _grouped_mm(_laid_out(x), _laid_out(matrices), self.ends(x.device))
        out = x.new_empty(len(x), matrices.shape[2])
        for place, rows in self.pieces():
            torch.mm(x[rows], matrices[place], out=out[rows])
        return out

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """``[experts, k, m]``: for every expert the sum over its rows of the products of ``[n, k]`` and ``[n, m]``."""
        if has_grouped_mm(x, x.shape[1], y.shape[1]):
            out = _grouped_mm(_laid_out(x).mT, _laid_out(y), self.ends(x.device))
            if self._ends is None:  # experts without rows: the kernel may not have written their part
                ends = self.ends(x.device)
                empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
                out = out.masked_fill(empty[:, None, None], 0)
            return out
        out = x.new_empty(len(self.experts), x.shape[1], y.shape[1])
        for place, rows in self.pieces():
            torch.mm(x[rows].mT, y[rows], out=out[place])
        return out


def has_grouped_mm(x: Tensor, *sizes: int) -> bool:
    """Whether torch has a kernel for grouped products of the dtype and device of `x`, with matrices of these sizes."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or any(size % _ALIGNED for size in sizes):
        return False
    return hasattr(torch.nn.functional, "grouped_mm") and _is_ampere(x.device)


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values`, for which the host waits for nothing."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _grouped_mm(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, y, offs=ends)


def _laid_out(matrices: Tensor) -> Tensor:
    """`matrices`, copied unless their rows, or their columns, are contiguous and aligned."""
    one = matrices.element_size()
    row, column = matrices.stride()[-2:]
    wide, high = matrices.shape[-1], matrices.shape[-2]
    aligned = matrices.data_ptr() % 16 == 0 and all(
        stride * one % 16 == 0 for stride in matrices.stride() if stride != 1
    )
    if aligned and ((column == 1 and row >= wide) or (row == 1 and column >= high)):
        return matrices
    return matrices.contiguous()
