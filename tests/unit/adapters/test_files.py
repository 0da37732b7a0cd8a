"""What null stands for in the configurations of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig

from lowrank_dist.adapters.files import read_config
from lowrank_dist.errors import CheckpointError


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout", "r"])
def test_null_for_a_number_is_named(tmp_path: Path, name: str) -> None:
    LoraConfig(r=4).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: None}))
    with pytest.raises(CheckpointError, match=name):
        read_config(tmp_path)


def test_null_for_a_flag_or_for_what_is_null_by_default_is_read(tmp_path: Path) -> None:
    LoraConfig(r=4).save_pretrained(str(tmp_path / "lora"))
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": None, "target_modules": None}))
    assert not read_config(tmp_path / "lora").use_rslora
    PromptTuningConfig(num_virtual_tokens=4).save_pretrained(str(tmp_path / "prompt"))
    assert json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())["token_dim"] is None
    assert read_config(tmp_path / "prompt").token_dim is None
