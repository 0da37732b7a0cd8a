"""What a forecast knows of a quantized checkpoint: the bytes that are stored, and those that a cache has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from helpers.models import save_checkpoint
from helpers.quantized import KINDS, quantize, write_dense
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.errors import ModelError
from lowrank_dist.forecast.job import ModelShapes


def test_bytes_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", num_hidden_layers=1, intermediate_size=96, max_shard_size="1GB")
    decoded = quantize(dense, tmp_path / "model", KINDS["gptq-4"], is_quantized=lambda n: n.endswith("_proj.weight"))
    write_dense(tmp_path / "model", tmp_path / "decoded", decoded)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    found, expected = (ModelShapes.of(tmp_path / name, adapter) for name in ("model", "decoded"))
    reader = open_reader(tmp_path / "model")
    assert found.checkpoint_bytes == reader.nbytes
    assert found.frozen_bytes == reader.nbytes - reader.info("model.layers.0.self_attn.q_proj.weight").nbytes
    assert found.copied_bytes == expected.copied_bytes == expected.frozen_bytes
    assert found.frozen_bytes < expected.frozen_bytes
    assert reader.info("model.layers.0.self_attn.q_proj.weight").nbytes == sum(
        (64 * 64 // 2, 2 * 64 // 2, 2 * 64 * 2, 64 * 4)  # codes, zero points, scales, groups of inputs
    )
    assert next(iter(decoded.values())).dtype == torch.float32
    reader.close()
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="quantized by 'gptq', and only their headers say how many bytes"):
        ModelShapes.of(tmp_path / "model", adapter)
