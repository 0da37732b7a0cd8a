"""LoRA and QLoRA: a zero adapter beside the (quantized) weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.methods.assembly import layer_shape, sharded, unchanged
from lowrank_dist.methods.base import Decomposition, Matrix, Method
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.seeds import global_seed


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """``A ~ U(-1/sqrt(in), 1/sqrt(in))`` (PEFT's Kaiming initialisation), ``B = 0``; QLoRA where W is quantized.

    For embeddings A is zero and ``B ~ N(0, 1)``, as in PEFT. At step 0 the model computes W, or its quantization.

    Parameters
    ----------
    seed
        Mixed with the weight's name into the seed of the random factor. None: that of ``lightning.seed_everything``,
        or 0.

    See Also
    --------
    EVA : Takes A from the layer's inputs.
    PiSSA : Starts from the principal triplets of W.

    References
    ----------
    E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; arXiv:2106.09685.
    T. Dettmers et al., "QLoRA", NeurIPS 2023, equation 5; arXiv:2305.14314.

    Examples
    --------
    Decompose one matrix on one rank:

    >>> import torch
    >>> from lowrank_dist.distributed.group import ShardGroup
    >>> from lowrank_dist.distributed.partition import RowPartition
    >>> from lowrank_dist.methods import LoRA, Matrix
    >>> from lowrank_dist.quantization import Dense
    >>> matrix = Matrix(
    ...     name="layer.weight",
    ...     block=torch.randn(64, 32),
    ...     partition=RowPartition(rows=64, columns=32, world_size=1),
    ...     group=ShardGroup.single(),
    ...     rank=4,
    ...     scaling=1.0,
    ...     input_first=False,
    ...     factor_dtype=torch.float32,
    ... )
    >>> found = LoRA().decompose(matrix, Dense(dtype=torch.float32))
    >>> found.factors.left.shape, found.factors.right.shape
    (torch.Size([64, 4]), torch.Size([4, 32]))
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", global_seed())

    @property
    def starts_at_zero(self) -> bool:
        return True

    @property
    def looks_at_weights(self) -> bool:
        return False

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        inputs, outputs = layer_shape(matrix)
        generator = torch.Generator().manual_seed(seed_from_name(matrix.name, self.seed or 0))
        if matrix.lookup:
            a = torch.zeros(matrix.rank, inputs)
            b = torch.randn(outputs, matrix.rank, generator=generator)
        else:
            a = (torch.rand(matrix.rank, inputs, generator=generator) * 2 - 1).div_(math.sqrt(inputs))
            b = torch.zeros(outputs, matrix.rank)
        return unchanged(matrix, sharded(matrix, a, b), residual)
