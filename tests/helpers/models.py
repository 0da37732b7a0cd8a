"""Tiny checkpoints of real architectures, with random weights whose spectra fall off as pretrained ones do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CAUSAL_LMS = ("llama", "qwen2", "mistral", "gemma", "phi", "gpt2")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
    "llama": _SMALL,
    "qwen2": _SMALL,
    "mistral": _SMALL,
    "gemma": {**_SMALL, "head_dim": 16},
    "phi": _SMALL,
    "phi3": _SMALL,
    "mixtral": {**_SMALL, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_SMALL, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_SMALL,
        "head_dim": 16,
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {**_SMALL, "head_dim": 16, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def save_checkpoint(
    directory: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "100KB",
    auto_class: Any = AutoModelForCausalLM,
    save_original_format: bool = True,
    spectra: bool = True,
    **changes: Any,
) -> Path:
    """A tiny model of `architecture` as sharded safetensors under `directory`.

    Experts are on disk one by one, as models are published, unless `save_original_format` is off. Without `spectra` the
    weights are those that transformers draws: the spectra of a model that is not tiny take minutes.
    """
    options = {**ARCHITECTURES.get(architecture, {}), **changes}
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters() if spectra else ():
            for matrix in parameter if parameter.ndim == 3 else [parameter] if parameter.ndim == 2 else []:
                rows, columns = matrix.shape
                scale = torch.arange(1, columns + 1) ** -0.5
                mixing = torch.linalg.qr(torch.randn(columns, columns))[0]
                matrix.copy_(torch.randn(rows, columns) * scale @ mixing * 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=save_original_format)
    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `directory`."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_in_two(directory: Path, tensors: dict[str, Tensor], apart: dict[str, Tensor]) -> None:
    """Two safetensors files and their index; `apart` in the second."""
    files = {"model-1.safetensors": tensors, "model-2.safetensors": apart}
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def with_head(base: Path, directory: Path, head: Tensor) -> Path:
    """A copy of `base`, whose configuration ties the head, with ``lm_head.weight`` stored beside the embedding."""
    directory.mkdir()
    shutil.copy(base / "config.json", directory)
    save_in_two(directory, stored(base), {"lm_head.weight": head})
    return directory
