"""Counts the bytes of collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

#: The collectives of training, and the argument that is as large as the whole tensor.
COLLECTIVES = {"all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input", "all_reduce": "tensor"}


class Traffic:
    """Counts from now on what this rank communicates: ``calls`` are (name, ranks of the group, bytes of the whole)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], int]] = []
        for name, argument in COLLECTIVES.items():
            setattr(dist, name, self._counted(name, argument, getattr(dist, name)))

    def _counted(self, name: str, argument: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in args if isinstance(value, Tensor)]
            whole = kwargs[argument] if argument in kwargs else max(tensors, key=Tensor.numel)
            ranks = tuple(dist.get_process_group_ranks(kwargs.get("group") or dist.group.WORLD))
            self.calls.append((name, ranks, whole.numel() * whole.element_size()))
            return real(*args, **kwargs)

        return collective

    def nbytes(self, name: str, *, calls: slice = slice(None)) -> dict[int, int]:
        """Bytes of the calls of `name` among `calls`, by the size of their groups."""
        found: dict[int, int] = {}
        for call, ranks, nbytes in self.calls[calls]:
            if call == name:
                found[len(ranks)] = found.get(len(ranks), 0) + nbytes
        return found
