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


RESIDUAL_STEM = "residual"  # of root files of residual models that stock transformers cannot load


def residual_stem(directory: Path) -> str:
    """First part of the names of the files at the root of a residual model."""
    return RESIDUAL_STEM if any(directory.glob(f"{RESIDUAL_STEM}*.safetensors")) else "model"


def parts_of(checkpoint: Path) -> list[Path]:
    """The directories of a checkpoint from which other adapters are made, the checkpoint among them."""
    return [checkpoint, *(checkpoint / part for part in (ADAPTER_DIR, INITIAL_DIR, ENCODED_DIR))]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint wrote")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises
    ------
    CheckpointError
        If the file is missing, or holds anything else.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); it is damaged") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object; it is damaged")
    return values


QUANT_STATE = ".quant_state.bitsandbytes__nf4"
