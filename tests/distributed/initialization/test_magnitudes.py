"""Where DoRA has no start: a weight without a direction."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import save_file

from helpers.models import save_checkpoint, stored
from helpers.ranks import run_ranks_catching
from helpers.training import fit
from lowrank_dist import NF4, LoRA, PiSSA
from lowrank_dist.methods import Method
from lowrank_dist.quantization.format import ResidualFormat

LAYER = "model.layers.1.self_attn.v_proj"


def start(pretrained: Path, init: Method, quantization: ResidualFormat | None) -> None:
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["v_proj"], use_dora=True)
    fit(pretrained, steps=1, adapter=adapter, init=init, quantization=quantization)


@pytest.mark.parametrize(("init", "quantization"), [(LoRA(), NF4()), (PiSSA(), None)], ids=str)
def test_a_row_of_zeros_is_refused(tmp_path: Path, init: Method, quantization: ResidualFormat | None) -> None:
    """PEFT divides by its norm and computes NaN."""
    base = save_checkpoint(tmp_path / "base", max_shard_size="1GB")
    tensors = stored(base)
    tensors[f"{LAYER}.weight"][[3, 5]] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for _, error in run_ranks_catching(2, start, base, init, quantization):
        assert f"2 of 32 outputs of {LAYER} have weights that are all zero (the first is 3)" in str(error)
        assert "drop it from target_modules, or leave use_dora out" in str(error)
