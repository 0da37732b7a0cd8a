"""Residual formats: how the frozen part of a matrix is stored, sharded and decoded.

A format is a frozen dataclass with the members of `ResidualFormat`; the walk, the layers and the files know no more of
it.
"""

from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import Encoded, ResidualFormat
from lowrank_dist.quantization.nf4 import NF4

__all__ = ["NF4", "Dense", "Encoded", "ResidualFormat"]
