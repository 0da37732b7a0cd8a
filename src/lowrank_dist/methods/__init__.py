"""Initialisations: how a pretrained matrix is split into trainable factors and a frozen residual."""

from lowrank_dist.methods.base import Decomposition, Factors, Matrix, Method
from lowrank_dist.methods.loftq import LoftQ
from lowrank_dist.methods.lora import LoRA
from lowrank_dist.methods.pissa import PiSSA

__all__ = ["Decomposition", "Factors", "LoRA", "LoftQ", "Matrix", "Method", "PiSSA"]
