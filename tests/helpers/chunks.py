"""Ways to prepare chunks, for other processes: a module that imports little, because they import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch

from lowrank_dist.data.chunks import Chunk
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.errors import InputError


def make(kill: int | None = None) -> Callable[[Chunk], Loaded]:
    """Each value becomes an example; a negative one is bad, and `kill` ends the process."""

    def prepare(chunk: Chunk) -> Loaded:
        loaded = Loaded(records=len(chunk.records), lengths=[os.getpid()])
        for where, record in chunk.records:
            if record["value"] == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if record["value"] < 0:
                raise InputError(f"{where}: bad")
            loaded.examples.append(torch.full((2, 3), record["value"], dtype=torch.int32))
        return loaded

    return prepare


def killing() -> Callable[[Chunk], Loaded]:
    """The one that ends the process at 7."""
    return make(kill=7)
