"""Layers whose weight a model uses without calling them get no adapter, and that is said."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig

from helpers.families import FAMILIES, Family
from lowrank_dist.errors import ModelError
from lowrank_dist.model.bypassed import bypassed_layers
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.skeleton import inject_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def model_of(family: Family):
    with torch.device("meta"):
        return family.auto_class.from_config(family.configuration())


@pytest.mark.parametrize(
    ("name", "never", "sometimes"),
    [
        ("llama", set(), set()),
        ("t5", set(), set()),  # looks at the dtype of a weight only
        ("jamba", {"dt_proj"}, set()),
        ("mamba", {"dt_proj"}, {"x_proj", "out_proj"}),
        ("bamba", set(), {"out_proj"}),
        ("siglip", {"out_proj"}, set()),
        ("mobilebert (masked LM)", {"dense", "decoder"}, set()),
    ],
)
def test_found_in_the_source(name: str, never: set[str], sometimes: set[str]) -> None:
    found = bypassed_layers(model_of(FAMILIES[name]))
    by_leaf = {layer.rpartition(".")[2]: never_called for layer, never_called in found.items()}
    assert {leaf for leaf, never_called in by_leaf.items() if never_called} == never
    assert {leaf for leaf, never_called in by_leaf.items() if not never_called} == sometimes


def test_all_linear_leaves_them_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(FAMILIES["jamba"])
    with caplog.at_level(logging.WARNING):
        inject_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted = {plain_name(name) for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert any("x_proj" in name for name in adapted)
    assert not any("dt_proj" in name for name in adapted)
    assert "dt_proj" in caplog.text


def test_by_name_they_are_refused_or_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"multiplies by the weight of model.layers.0.mamba.dt_proj without calling"):
        inject_adapter(model_of(FAMILIES["jamba"]), LoraConfig(r=4, target_modules=["dt_proj", "x_proj"]))
    with caplog.at_level(logging.WARNING):
        inject_adapter(model_of(FAMILIES["mamba"]), LoraConfig(r=4, target_modules=["in_proj", "x_proj"]))
    assert "MambaForCausalLM passes over x_proj in its fused kernels" in caplog.text
