"""A checkpoint that is no file: weights of given shapes and spectra, generated wherever they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowrank_dist.linalg import seed_from_name
from lowrank_dist.model.skeleton import meta_parameters
from lowrank_dist.storage.reader import TensorInfo
from lowrank_dist.storage.source import tensors_of

_TILE = 1024  # rows that are generated together, at places fixed in the matrix


@dataclass(frozen=True, kw_only=True)
class SyntheticWeights:
    r"""Weights of the shapes of `config` with power-law spectra; a `lowrank_dist.storage.source.WeightSource`.

    A matrix ``m x n`` is ``W = D_0 H_m P S H_n D_1 H_n D_2``, with H the orthogonal Hartley matrix
    (``cas(2 pi i k / m) / sqrt(m)``), D random signs, P a random selection of ``s = min(m, n)`` of its columns and
    ``S = diag(sigma_1, ..., sigma_s)``, padded with zeros to n columns. All factors but S have orthonormal columns or
    rows, so that the singular values are exactly ``sigma_i = c i^-decay``, up to rounding; that to bf16 changes every
    entry by at most 2^-8 of it. ``c`` is such that ``||W||_F^2 = m``: rows have unit norm on average, and inputs of
    independent entries of unit variance give outputs of unit variance, which keeps activations of a deep model sane.

    Row i is row i of ``D_0 H_m P S``, a table of m values looked up at ``i k mod m``, then two Fourier transforms along
    it: any row costs ``O(n log n)``, on the device where it is wanted, and no matrix product.

    Parameters
    ----------
    config
        Of a causal language model of transformers.
    decay
        p of ``sigma_i = c i^-p``.
    dtype
        Of the values.
    device
        Where they are generated. CPU and CUDA round differently in the last bit.
    seed
        Mixed with each weight's name.

    Notes
    -----
    Values depend on name, shape and settings only, bit for bit: rows are generated 1024 at a time at fixed places,
    whatever part of them is asked for. Vectors are ones (norms) or zeros (biases).
    """

    config: PretrainedConfig
    decay: float = 0.5
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0
    tensors: dict[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        with meta_parameters():
            skeleton = AutoModelForCausalLM.from_config(self.config)
        object.__setattr__(self, "tensors", tensors_of(skeleton, self.dtype))

    @property
    def name(self) -> str:
        """Says what the values depend on."""
        return f"synthetic-{self.config.model_type}-{self.config.num_hidden_layers}x{self.config.hidden_size}"

    @property
    def fingerprint(self) -> str:
        shapes = [(name, info.shape) for name, info in sorted(self.tensors.items())]
        return repr((type(self).__name__, self.decay, str(self.dtype), self.device, self.seed, shapes))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension, on `device`."""
        shape = self.tensors[name].shape
        if len(shape) == 1:
            return torch.full((stop - start,), float(not name.endswith("bias")), dtype=self.dtype, device=self.device)
        if len(shape) == 3:
            return torch.stack([self._matrix(f"{name}[{i}]", shape[1:], 0, shape[1]) for i in range(start, stop)])
        return self._matrix(name, shape, start, stop)

    def spectrum(self, rows: int, columns: int) -> Tensor:
        """Singular values of a matrix of this shape, ``[min(rows, columns)]`` fp32, descending."""
        values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -self.decay
        return (values * math.sqrt(rows) / values.norm()).float()

    def _matrix(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, shape[1], dtype=self.dtype, device=self.device)
        for first, tile in self._tiles(name, shape, start, stop):
            low, high = max(first, start), min(first + len(tile), stop)
            out[low - start : high - start] = tile[low - first : high - first]
        return out

    def _tiles(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Tiles that overlap ``start:stop``, with their first rows; the last of a matrix may be short."""
        m, n = shape
        generator = torch.Generator().manual_seed(seed_from_name(name, self.seed))
        sigma = self.spectrum(m, n).to(self.device)
        columns = torch.randperm(m, generator=generator)[: len(sigma)].to(self.device)
        of_rows, inner, outer = (_signs(size, generator).to(self.device) for size in (m, n, n))
        angles = torch.arange(m, dtype=torch.float64) * (2 * math.pi / m)
        cas = ((angles.cos() + angles.sin()) / math.sqrt(m)).float().to(self.device)
        for first in range(start // _TILE * _TILE, stop, _TILE):
            here = torch.arange(first, min(first + _TILE, m), device=self.device)
            tile = cas[torch.outer(here, columns).remainder_(m)].mul_(sigma).mul_(of_rows[here, None])
            tile = torch.nn.functional.pad(tile, (0, n - len(sigma)))
            yield first, hartley(hartley(tile).mul_(inner)).mul_(outer)


def hartley(rows: Tensor) -> Tensor:
    """The orthogonal discrete Hartley transform of every row."""
    n = rows.shape[1]
    transformed = torch.fft.rfft(rows, norm="ortho")
    half = transformed.shape[1]
    mirrored = (transformed.real + transformed.imag)[:, 1 : n - half + 1].flip(1)  # of conjugates
    return torch.cat([transformed.real - transformed.imag, mirrored], dim=1)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator).float().mul_(2).sub_(1)
