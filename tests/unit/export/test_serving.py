"""What vLLM would object to in a LoRA, by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank_dist.export.serving import objections

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight")
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("names", "config", "messages"),
    [
        (PLAIN, {}, []),
        (
            (*PLAIN, "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"),
            {},
            ["It holds lm_head.weight and 1 more whole, and vLLM refuses"],
        ),
        ((*PLAIN, "base_model.model.score.weight"), {"modules_to_save": ["score"]}, []),
        ((*PLAIN, "bare"), {"modules_to_save": ["score"]}, ["It holds bare whole, and vLLM refuses"]),
        (
            (*PLAIN, "base_model.model.score.weight"),
            {},
            ["It holds score.weight whole, and vLLM refuses"],
        ),
        (
            (*PLAIN, f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"),
            {},
            ["It adapts the embedding model.embed_tokens, which"],
        ),
        (PLAIN, {"target_parameters": ["mlp.experts.gate_up_proj"]}, ["It adapts experts in one tensor (mlp.experts"]),
    ],
)
def test_objections(names: tuple[str, ...], config: dict[str, Any], messages: list[str], tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    found = objections(tmp_path)
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert line.startswith(message)
