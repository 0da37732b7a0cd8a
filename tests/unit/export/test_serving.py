"""What servers would make of a LoRA, by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank_dist.export.serving import objections

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = tuple(f"{LAYER.replace('q_', leaf)}.lora_{side}.weight" for leaf in ("q_", "v_") for side in "AB")
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("names", "config", "messages"),
    [
        (PLAIN, {}, []),
        (
            (*PLAIN, "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"),
            {},
            ["It holds lm_head.weight and 1 more whole. vLLM refuses"],
        ),
        (
            (*PLAIN, "base_model.model.score.weight"),
            {"modules_to_save": ["score"]},
            ["It holds the head score.weight, which vLLM takes and SGLang leaves out"],
        ),
        ((*PLAIN, "bare"), {"modules_to_save": ["score"]}, ["It holds bare whole. vLLM refuses"]),
        (
            (*PLAIN, "base_model.model.score.weight"),
            {},
            ["It holds score.weight whole. vLLM refuses"],
        ),
        (
            (*PLAIN, f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"),
            {},
            ["It adapts the embedding model.embed_tokens, which"],
        ),
        (PLAIN, {"target_parameters": ["mlp.experts.gate_up_proj"]}, ["It adapts experts in one tensor (mlp.experts"]),
        (PLAIN, {"use_dora": True}, ["It is a DoRA, which vLLM, SGLang and llama.cpp refuse"]),
        (PLAIN, {"alpha_pattern": {"q_proj": 3}}, ["Its scalings are not all lora_alpha / r (alpha_pattern)."]),
        (
            PLAIN,
            {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
            ["Its scalings are not all lora_alpha / r (use_rslora).", "Its ranks differ (rank_pattern)."],
        ),
        (PLAIN, {"target_modules": ".*[qv]_proj"}, ["Its target_modules are a regular expression, which SGLang"]),
        (PLAIN, {"target_modules": "all-linear"}, []),
        (PLAIN, {"r": 32}, ["vLLM needs --max-lora-rank 32: by default it takes ranks up to 16."]),
        (
            PLAIN,
            {"r": 24},
            ["vLLM's --max-lora-rank is one of 1, 8, 16, 32, 64, 128, 256, 320, 512: rank 24 needs 32."],
        ),
        (
            PLAIN,
            {"r": 600},
            ["vLLM's --max-lora-rank is one of 1, 8, 16, 32, 64, 128, 256, 320, 512: rank 600 is beyond"],
        ),
        (PLAIN, {"r": 8, "rank_pattern": {"q_proj": 64}}, ["vLLM needs --max-lora-rank 64", "Its ranks differ"]),
        (
            PLAIN[:2],
            {},
            ["It adapts q_proj of model.layers.0.self_attn: SGLang takes them with both q_proj and v_proj only"],
        ),
    ],
)
def test_objections(names: tuple[str, ...], config: dict[str, Any], messages: list[str], tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    found = objections(tmp_path)
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert line.startswith(message)
