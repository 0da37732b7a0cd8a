"""Regular expressions from files: those that could take for ever are refused before they are matched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.adapters.files import read_config
from lowrank_dist.adapters.patterns import check_pattern
from lowrank_dist.errors import CheckpointError


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q|v)_proj",
        r"^(?!.*visual).*\.(q_proj|k_proj)$",
        r"model\.layers\.(\d+)\..*(q_proj|v_proj)",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up)",
        r"(layers\.\d+\.)?q_proj",
    ],
)
def test_patterns_in_use_are_taken(pattern: str) -> None:
    check_pattern(pattern, "file")
    re.fullmatch(pattern, "model.layers.17.self_attn.q_proj" * 3)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(.*)*x",
        ".*" * 30 + "x",
        "(?:[a-z]+a?)*b",
        "(){1000000000}",
        "(",
        "x" * 20_000,
        r"(a*)(\1)*b",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_that_may_hang_are_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="^file: .* is not a regular expression that can be matched"):
        check_pattern(pattern, "file")


@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": "(a+)+$"},
        {"exclude_modules": "(.*)*x"},
        {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"q_proj": -3}},
        {"r": 0},
        {"r": "8"},
        {"r": 10**9},
        {"lora_alpha": float("nan")},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": "\x1b[2J"},
        {"layers_to_transform": {"a": 1}},
        {"peft_type": "MOON"},
        {"peft_type": ["LORA"]},
        {"unknown": "x", "r": None, "lora_alpha": []},
    ],
    ids=str,
)
def test_a_configuration_of_other_types_is_damaged(tmp_path: Path, entries: dict[str, Any]) -> None:
    usual = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(usual | entries))
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        read_config(tmp_path)
