"""Tiny checkpoints of real architectures, with random weights whose spectra fall off as pretrained ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    **changes: Any,
) -> Path:
    """A tiny model of `architecture` as sharded safetensors under `directory`."""
    options = {**ARCHITECTURES.get(architecture, {}), **changes}
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                scale = torch.arange(1, columns + 1) ** -0.5
                mixing = torch.linalg.qr(torch.randn(columns, columns))[0]
                parameter.copy_(torch.randn(rows, columns) * scale @ mixing * 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
