"""Linear algebra of row-sharded matrices: orthonormalization and the leading singular triplets.

Everything is computed in true fp32, except that Gram matrices for orthonormalization are in fp64 and the power loop on
CUDA is in tf32. Rank 0 takes every decision that depends on data, and broadcasts it.
"""

from lowrank_dist.linalg.krylov import SVD, randomized_svd, seed_from_name
from lowrank_dist.linalg.orthonormal import orthonormalize, row_signs
from lowrank_dist.linalg.precision import all_finite, full_fp32, minus_product, slabs, squared_norm

__all__ = [
    "SVD",
    "all_finite",
    "full_fp32",
    "minus_product",
    "orthonormalize",
    "randomized_svd",
    "row_signs",
    "seed_from_name",
    "slabs",
    "squared_norm",
]
