"""Initialisations: how a pretrained matrix is split into trainable factors and a frozen residual.

Public are the names in ``__all__``; the modules below are private.
"""

from lowrank_dist.methods.assembly import layer_shape, sharded, subtracted, unchanged
from lowrank_dist.methods.base import Decomposition, Factors, Matrix, Method
from lowrank_dist.methods.corda import CorDA
from lowrank_dist.methods.eva import EVA
from lowrank_dist.methods.loftq import LoftQ
from lowrank_dist.methods.lora import LoRA
from lowrank_dist.methods.lora_ga import LoRAGA
from lowrank_dist.methods.lora_one import LoRAOne
from lowrank_dist.methods.lora_xs import LoRAXS
from lowrank_dist.methods.milora import MiLoRA
from lowrank_dist.methods.olora import OLoRA
from lowrank_dist.methods.pissa import PiSSA
from lowrank_dist.methods.qera import QERA
from lowrank_dist.methods.registry import METHODS, method_named, register
from lowrank_dist.methods.svft import SVFT

register("pissa")(PiSSA)
register("lora")(LoRA)
register("loftq")(LoftQ)
register("olora")(OLoRA)
register("milora")(MiLoRA)
register("corda")(CorDA)
register("eva")(EVA)
register("lora_ga")(LoRAGA)
register("lora_one")(LoRAOne)
register("lora_xs")(LoRAXS)
register("qera")(QERA)
register("svft")(SVFT)

__all__ = [
    "EVA",
    "METHODS",
    "QERA",
    "SVFT",
    "CorDA",
    "Decomposition",
    "Factors",
    "LoRA",
    "LoRAGA",
    "LoRAOne",
    "LoRAXS",
    "LoftQ",
    "Matrix",
    "Method",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "layer_shape",
    "method_named",
    "register",
    "sharded",
    "subtracted",
    "unchanged",
]
