"""Bytes of quantized weights from the configuration alone, against those of files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from helpers.models import save_checkpoint
from helpers.quantized import KINDS, quantize, quantize_experts
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decoding.sizes import shapes_only
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.storage.source import SourceReader

ONE_FILE = {"max_shard_size": "1GB"}


def compared(directory: Path) -> tuple[int, int]:
    """Bytes from the configuration, and from the headers."""
    reader = open_reader(directory)
    stored = reader.nbytes
    reader.close()
    return SourceReader(shapes_only(build_skeleton(directory))).nbytes, stored


def test_fp8_with_block_scales(tmp_path: Path) -> None:
    """As DeepSeek-V3: linear layers but the head."""
    dense = save_checkpoint(tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=False, **ONE_FILE)
    quantize(dense, tmp_path / "model", KINDS["fp8-blocks"], is_quantized=lambda name: name.endswith("_proj.weight"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"]
    said, stored = compared(tmp_path / "model")
    assert said == stored


def test_mxfp4_of_stacked_experts(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "gpt_oss", dtype=torch.bfloat16, intermediate_size=64, **ONE_FILE)
    quantize_experts(dense, tmp_path / "model")
    said, stored = compared(tmp_path / "model")
    assert said == stored
