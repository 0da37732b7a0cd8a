"""Export of checkpoints: LoRA adapters for the original model, and merged models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_dist._lazy import lazy_exports

if TYPE_CHECKING:
    from lowrank_dist.export.convert import convert_checkpoint as convert_checkpoint
    from lowrank_dist.export.merge import merge_checkpoint as merge_checkpoint
    from lowrank_dist.export.refit import refit_checkpoint as refit_checkpoint

_EXPORTS = {f"{name}_checkpoint": f"lowrank_dist.export.{name}" for name in ("convert", "merge", "refit")}

__all__ = ["convert_checkpoint", "merge_checkpoint", "refit_checkpoint"]

# lazy: refit imports DeepSpeed and bitsandbytes, which convert does not need
__getattr__ = lazy_exports(__name__, _EXPORTS)
