"""Lightning callbacks."""

from lowrank_dist.callbacks.adapter_checkpoint import AdapterCheckpoint

__all__ = ["AdapterCheckpoint"]
