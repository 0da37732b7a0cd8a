"""Residual formats: how the frozen part of a matrix is stored, sharded and decoded.

A format is a frozen dataclass with the members of `ResidualFormat`; the walk, the layers and the files know no more of
it.
"""

from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import Encoded, ResidualFormat
from lowrank_dist.quantization.fp4 import FP4
from lowrank_dist.quantization.fp8 import FP8
from lowrank_dist.quantization.int8 import INT8
from lowrank_dist.quantization.mxfp4 import MXFP4
from lowrank_dist.quantization.nf4 import NF4

__all__ = ["FP4", "FP8", "INT8", "MXFP4", "NF4", "BlockFormat", "Dense", "Encoded", "ResidualFormat"]
