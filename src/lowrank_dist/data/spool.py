"""Tokens written to files as they are made, so that memory holds those of a chunk."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.packing import Tokens
from lowrank_dist.data.tokenizing import WEIGHTS

_BLOCK = 2**20  # values of a token that were left out, written at a time


class Spool:
    """Takes examples chunk by chunk, and gives back all of them as `Tokens` that are mapped from files.

    Parameters
    ----------
    directory
        Where the files are put, beside nothing else; it is made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._sizes: list[int] = []
        self._targets: list[int] = []
        self._total = self._largest = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def __call__(self, part: Loaded) -> None:
        """Append the examples of a part."""
        if not part.examples:
            return
        tokens = Tokens.of(part.examples, part.along, part.targets)
        count = len(tokens.tokens)
        for name, values in {"tokens": tokens.tokens, "labels": tokens.labels, **tokens.along}.items():
            if name not in self._files:
                self._files[name] = open(self._directory / name, "wb")  # noqa: SIM115
                self._dtypes[name] = values.dtype
                self._fill(name, self._total)
            self._files[name].write(values.contiguous().numpy().data)
        for name in self._files.keys() - {"tokens", "labels", *tokens.along}:
            self._fill(name, count)
        self._total += count
        self._sizes += tokens.sizes
        self._targets += part.targets
        self._largest = max(self._largest, tokens.largest)

    def _fill(self, name: str, count: int) -> None:
        """Write what tokens have where their examples lack `name`."""
        for at in range(0, count, _BLOCK):
            size = min(_BLOCK, count - at)
            values = torch.ones(size) if name == WEIGHTS else torch.zeros(size)
            self._files[name].write(values.numpy().data)

    def tokens(self) -> Tokens:
        """All of them, mapped from the files, which must stay."""
        for file in self._files.values():
            file.flush()

        def mapped(name: str) -> Tensor:
            return torch.from_file(str(self._directory / name), size=self._total, dtype=self._dtypes[name])

        targets = None
        if any(target >= 0 for target in self._targets):
            targets = torch.tensor(self._targets, dtype=torch.int64)
        return Tokens(
            tokens=mapped("tokens"),
            labels=mapped("labels"),
            sizes=self._sizes,
            largest=self._largest,
            along={name: mapped(name) for name in sorted(self._files.keys() - {"tokens", "labels"})},
            targets=targets,
        )
