"""Low-rank adaptation of models too big for one machine: PiSSA and its kin under Lightning and DeepSpeed ZeRO-3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_dist._version import __version__ as __version__

_EXPORTS = {
    "PiSSAStrategy": "lowrank_dist.training.strategy",
    "AdapterCheckpoint": "lowrank_dist.callbacks",
    "HealthCheck": "lowrank_dist.callbacks",
    "InitReport": "lowrank_dist.callbacks",
    "LossHistory": "lowrank_dist.callbacks",
    "Preemption": "lowrank_dist.callbacks",
    "NF4": "lowrank_dist.quantization.nf4",
    "Calibration": "lowrank_dist.calibration.measure",
    "PiSSA": "lowrank_dist.methods",
    "LoRA": "lowrank_dist.methods",
    "LoftQ": "lowrank_dist.methods",
    "OLoRA": "lowrank_dist.methods",
    "MiLoRA": "lowrank_dist.methods",
    "CorDA": "lowrank_dist.methods",
    "EVA": "lowrank_dist.methods",
    "LoRAGA": "lowrank_dist.methods",
    "LoRAXS": "lowrank_dist.methods",
    "register": "lowrank_dist.methods",
    "SFTDataModule": "lowrank_dist.data.datamodule",
    "CausalLMModule": "lowrank_dist.training.module",
    "convert_checkpoint": "lowrank_dist.export.convert",
    "merge_checkpoint": "lowrank_dist.export.merge",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from lowrank_dist.calibration.measure import Calibration as Calibration
    from lowrank_dist.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from lowrank_dist.callbacks import HealthCheck as HealthCheck
    from lowrank_dist.callbacks import InitReport as InitReport
    from lowrank_dist.callbacks import LossHistory as LossHistory
    from lowrank_dist.callbacks import Preemption as Preemption
    from lowrank_dist.data.datamodule import SFTDataModule as SFTDataModule
    from lowrank_dist.export.convert import convert_checkpoint as convert_checkpoint
    from lowrank_dist.export.merge import merge_checkpoint as merge_checkpoint
    from lowrank_dist.methods import EVA as EVA
    from lowrank_dist.methods import CorDA as CorDA
    from lowrank_dist.methods import LoftQ as LoftQ
    from lowrank_dist.methods import LoRA as LoRA
    from lowrank_dist.methods import LoRAGA as LoRAGA
    from lowrank_dist.methods import LoRAXS as LoRAXS
    from lowrank_dist.methods import MiLoRA as MiLoRA
    from lowrank_dist.methods import OLoRA as OLoRA
    from lowrank_dist.methods import PiSSA as PiSSA
    from lowrank_dist.methods import register as register
    from lowrank_dist.quantization.nf4 import NF4 as NF4
    from lowrank_dist.training.module import CausalLMModule as CausalLMModule
    from lowrank_dist.training.strategy import PiSSAStrategy as PiSSAStrategy


def __getattr__(name: str) -> Any:
    """Import the heavy halves (lightning, deepspeed, bitsandbytes) only when they are asked for."""
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
