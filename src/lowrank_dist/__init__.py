"""Low-rank adaptation of models too big for one machine: PiSSA and its kin under Lightning and DeepSpeed ZeRO-3.

Public are the names below and the modules `lowrank_dist.methods`, `lowrank_dist.quantization`, `lowrank_dist.linalg`,
`lowrank_dist.storage`, `lowrank_dist.export`, `lowrank_dist.callbacks` and `lowrank_dist.errors`, with what they list
in ``__all__``. Everything else is private and may change with any version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_dist._lazy import lazy_exports
from lowrank_dist._version import __version__ as __version__

_EXPORTS = {
    "PiSSAStrategy": "lowrank_dist.training.strategy",
    "CausalLMModule": "lowrank_dist.training.module",
    "PreferenceModule": "lowrank_dist.training.preference",
    "SequenceClassificationModule": "lowrank_dist.training.classification",
    "SFTDataModule": "lowrank_dist.data.datamodule",
    "PublishedRate": "lowrank_dist.training.published_rates",
    "published_rates": "lowrank_dist.training.published_rates",
    "NF4": "lowrank_dist.quantization",
    "FP4": "lowrank_dist.quantization",
    "INT8": "lowrank_dist.quantization",
    "FP8": "lowrank_dist.quantization",
    "MXFP4": "lowrank_dist.quantization",
    "Calibration": "lowrank_dist.calibration.measure",
    "WeightSource": "lowrank_dist.storage",
    "Method": "lowrank_dist.methods",
    "register": "lowrank_dist.methods",
    "PiSSA": "lowrank_dist.methods",
    "LoRA": "lowrank_dist.methods",
    "LoftQ": "lowrank_dist.methods",
    "OLoRA": "lowrank_dist.methods",
    "MiLoRA": "lowrank_dist.methods",
    "CorDA": "lowrank_dist.methods",
    "EVA": "lowrank_dist.methods",
    "LoRAGA": "lowrank_dist.methods",
    "LoRAOne": "lowrank_dist.methods",
    "LoRAXS": "lowrank_dist.methods",
    "QERA": "lowrank_dist.methods",
    "SVFT": "lowrank_dist.methods",
    "AdapterCheckpoint": "lowrank_dist.callbacks",
    "EvaluateTasks": "lowrank_dist.callbacks",
    "HealthCheck": "lowrank_dist.callbacks",
    "InitReport": "lowrank_dist.callbacks",
    "LossHistory": "lowrank_dist.callbacks",
    "Preemption": "lowrank_dist.callbacks",
    "StepMonitor": "lowrank_dist.callbacks",
    "convert_checkpoint": "lowrank_dist.export",
    "refit_checkpoint": "lowrank_dist.export",
    "merge_checkpoint": "lowrank_dist.export",
    "inspect": "lowrank_dist.storage.inspect",
    "InputError": "lowrank_dist.errors",
    "ModelError": "lowrank_dist.errors",
    "CheckpointError": "lowrank_dist.errors",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from lowrank_dist.calibration.measure import Calibration as Calibration
    from lowrank_dist.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from lowrank_dist.callbacks import EvaluateTasks as EvaluateTasks
    from lowrank_dist.callbacks import HealthCheck as HealthCheck
    from lowrank_dist.callbacks import InitReport as InitReport
    from lowrank_dist.callbacks import LossHistory as LossHistory
    from lowrank_dist.callbacks import Preemption as Preemption
    from lowrank_dist.callbacks import StepMonitor as StepMonitor
    from lowrank_dist.data.datamodule import SFTDataModule as SFTDataModule
    from lowrank_dist.errors import CheckpointError as CheckpointError
    from lowrank_dist.errors import InputError as InputError
    from lowrank_dist.errors import ModelError as ModelError
    from lowrank_dist.export import convert_checkpoint as convert_checkpoint
    from lowrank_dist.export import merge_checkpoint as merge_checkpoint
    from lowrank_dist.export import refit_checkpoint as refit_checkpoint
    from lowrank_dist.methods import EVA as EVA
    from lowrank_dist.methods import QERA as QERA
    from lowrank_dist.methods import SVFT as SVFT
    from lowrank_dist.methods import CorDA as CorDA
    from lowrank_dist.methods import LoftQ as LoftQ
    from lowrank_dist.methods import LoRA as LoRA
    from lowrank_dist.methods import LoRAGA as LoRAGA
    from lowrank_dist.methods import LoRAOne as LoRAOne
    from lowrank_dist.methods import LoRAXS as LoRAXS
    from lowrank_dist.methods import Method as Method
    from lowrank_dist.methods import MiLoRA as MiLoRA
    from lowrank_dist.methods import OLoRA as OLoRA
    from lowrank_dist.methods import PiSSA as PiSSA
    from lowrank_dist.methods import register as register
    from lowrank_dist.quantization import FP4 as FP4
    from lowrank_dist.quantization import FP8 as FP8
    from lowrank_dist.quantization import INT8 as INT8
    from lowrank_dist.quantization import MXFP4 as MXFP4
    from lowrank_dist.quantization import NF4 as NF4
    from lowrank_dist.storage import WeightSource as WeightSource
    from lowrank_dist.storage.inspect import inspect as inspect
    from lowrank_dist.training.classification import SequenceClassificationModule as SequenceClassificationModule
    from lowrank_dist.training.module import CausalLMModule as CausalLMModule
    from lowrank_dist.training.preference import PreferenceModule as PreferenceModule
    from lowrank_dist.training.published_rates import PublishedRate as PublishedRate
    from lowrank_dist.training.published_rates import published_rates as published_rates
    from lowrank_dist.training.strategy import PiSSAStrategy as PiSSAStrategy

# lightning, deepspeed and bitsandbytes are imported only by who asks for what needs them
__getattr__ = lazy_exports(__name__, _EXPORTS)
