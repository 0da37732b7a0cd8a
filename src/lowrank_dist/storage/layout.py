"""Names of files and directories that this project writes, and its manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank_dist.errors import CheckpointError

ADAPTER_DIR = "adapter"  # trained A and B, for the residual


INITIAL_DIR = "adapter_init"  # A_0 and B_0


ENCODED_DIR = "adapter_encoded"  # factors that residuals were encoded from, where these are not A_0 and B_0


LORA_DIR = "lora"  # converted, for the original model


MANIFEST = "lowrank_dist.json"


WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


RESIDUAL_STEM = "residual"  # of the files at the root of residual models that stock transformers has no layout for


def residual_stem(directory: Path) -> str:
    """First part of the names of the files at the root of a residual model."""
    return RESIDUAL_STEM if any(directory.glob(f"{RESIDUAL_STEM}*.safetensors")) else "model"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint wrote")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); it is damaged") from error
    return values


QUANT_STATE = ".quant_state.bitsandbytes__nf4"
