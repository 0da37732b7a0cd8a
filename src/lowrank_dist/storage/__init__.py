"""Bytes on disk: safetensors files that are read by rows and written in place; no arithmetic."""

from lowrank_dist.storage.reader import CheckpointReader, TensorInfo, resolve_checkpoint
from lowrank_dist.storage.source import WeightSource

__all__ = ["CheckpointReader", "TensorInfo", "WeightSource", "resolve_checkpoint"]
