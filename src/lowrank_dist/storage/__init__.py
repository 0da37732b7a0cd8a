"""Bytes on disk: safetensors files that are read by rows and written in place; no arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_dist._lazy import lazy_exports

if TYPE_CHECKING:
    from lowrank_dist.storage.reader import CheckpointReader as CheckpointReader
    from lowrank_dist.storage.reader import TensorInfo as TensorInfo
    from lowrank_dist.storage.resolve import resolve_checkpoint as resolve_checkpoint
    from lowrank_dist.storage.source import WeightSource as WeightSource

_EXPORTS = {
    "CheckpointReader": "lowrank_dist.storage.reader",
    "TensorInfo": "lowrank_dist.storage.reader",
    "WeightSource": "lowrank_dist.storage.source",
    "resolve_checkpoint": "lowrank_dist.storage.resolve",
}

__all__ = ["CheckpointReader", "TensorInfo", "WeightSource", "resolve_checkpoint"]

# lazy: they import torch, which modules that look at headers alone do without
__getattr__ = lazy_exports(__name__, _EXPORTS)
