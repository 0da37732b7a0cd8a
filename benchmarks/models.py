"""What is decomposed: checkpoints of given shapes and spectra, and the best residuals that a rank allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_dist.model.plan import PlannedMatrix, open_plan
from lowrank_dist.storage.reader import CheckpointReader

ModelShapes = dict[str, tuple[int, int]]


def llama_layer(hidden: int, key_value: int, intermediate: int) -> ModelShapes:
    """``[out, in]`` of the seven linears of a decoder layer."""
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


LLAMA_8B = llama_layer(4096, 1024, 14336)
LLAMA_70B = llama_layer(8192, 1024, 28672)
LLAMA_405B = llama_layer(16384, 1024, 53248)
TINY_LAYER = llama_layer(128, 32, 192)

MODELS_OF_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"


def with_spectrum(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with singular values i^-0.5; singular vectors are random signs and Hartley transforms, twice each."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    matrix = torch.zeros(rows, columns)
    matrix.diagonal().copy_(torch.arange(1, short + 1) ** -0.5)
    for dim in (0, 1, 0, 1):
        signs = torch.randint(0, 2, (matrix.shape[dim],), generator=generator).float() * 2 - 1
        matrix = _hartley(matrix * (signs[:, None] if dim == 0 else signs), dim)
    return matrix


def _hartley(matrix: Tensor, dim: int) -> Tensor:
    """The orthogonal discrete Hartley transform along `dim`."""
    transformed = torch.fft.fft(matrix, dim=dim)
    return (transformed.real - transformed.imag).div_(math.sqrt(matrix.shape[dim]))


def save_layer(directory: Path, shapes: ModelShapes) -> Path:
    """A bf16 checkpoint of matrices with spectra i^-0.5."""
    directory.mkdir(parents=True)
    tensors = {
        f"{name}.weight": with_spectrum(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_tiny_model(directory: Path) -> Path:
    """A random LLaMA of two layers."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def planned(directory: Path, reader: CheckpointReader, rank: int) -> list[PlannedMatrix]:
    """All linears of a model; all tensors of a checkpoint without a configuration."""
    if (directory / "config.json").is_file():
        return open_plan(reader, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")).plan.matrices
    return matrices({name.removesuffix(".weight"): reader.info(name).shape for name in sorted(reader)}, rank)  # type: ignore[misc]


def matrices(shapes: Mapping[str, tuple[int, int]], rank: int, layers: int = 1) -> list[PlannedMatrix]:
    """Linears of these shapes, of `layers` equal layers."""
    return [
        PlannedMatrix(
            layer=name, key=f"{name}.weight", rows=rows, columns=columns, input_first=False, rank=rank, scaling=1.0
        )
        for _ in range(layers)
        for name, (rows, columns) in shapes.items()
    ]


def best_residuals(directory: Path, rank: int) -> dict[str, float]:
    """``min ||W - X||_F`` over X of rank `rank`, by the names of all matrices to decompose."""
    reader = CheckpointReader(directory)
    return {m.key: best_residual(reader.rows(m.key, 0, m.rows), rank) for m in planned(directory, reader, rank)}


def best_residual(matrix: Tensor, rank: int) -> float:
    """From the eigenvalues of the fp64 Gram matrix: cheaper than `svdvals`, and the same to 1e-14 on model weights."""
    matrix = matrix.double()
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    return float(torch.linalg.eigvalsh(gram)[:-rank].clamp_min(0).sum().sqrt())
