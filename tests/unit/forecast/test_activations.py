"""Of layers that are alike only two run: what is said of all of them is what they save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from helpers.families import FAMILIES
from lowrank_dist.forecast.activations import Activations, measure_activations
from lowrank_dist.zero3.partition import repeated_layers

LENGTH = 8
#: Layers of one kind, of several kinds by turns, with positions, masks or states that layers share, with experts.
DEPTHS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 5},
    "gpt2": {"n_layer": 4},
    "gemma3_text": {"num_hidden_layers": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5},
    "gpt_oss": {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "mixtral": {"num_hidden_layers": 4},
    "deepseek_v3": {"num_hidden_layers": 5, "first_k_dense_replace": 2},
    "qwen3_next": {"num_hidden_layers": 8, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    "t5": {"num_layers": 4, "num_decoder_layers": 5},
}


class Named(nn.Module):
    """A part that tells its layer from all others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def backbone(name: str) -> PreTrainedModel:
    family = FAMILIES[name]
    family = replace(family, config={**family.config, **DEPTHS[name], "use_cache": False})
    with torch.device("meta"):
        model: PreTrainedModel = family.auto_class.from_config(family.configuration())
    return model


def measured(model: PreTrainedModel) -> Activations:
    return measure_activations(model, length=LENGTH, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_that_are_alike_save_the_same(name: str) -> None:
    model = backbone(name)
    said = measured(model)
    for index, layer in enumerate(repeated_layers(model)):
        layer.told_apart = Named(str(index))
    assert said == measured(model)
    assert said.measured
    assert len(said.layers) == len(repeated_layers(model))


@pytest.mark.parametrize(("sizes", "run"), [([4] * 5, [0, 1]), ([4, 4, 4, 8, 8], [0, 1, 3, 4])])
def test_they_do_not_run(sizes: list[int], run: list[int]) -> None:
    """Settings in lists count, too."""
    model = backbone("llama")
    calls = []
    for layer, size in zip(repeated_layers(model), sizes, strict=True):
        layer.sizes = [2, size]
        layer.register_forward_hook(lambda module, *_: calls.append(module.self_attn.layer_idx))
    assert measured(model).measured
    assert calls == run


def test_a_trained_layer_is_not_like_a_frozen_one() -> None:
    model = backbone("llama")
    model.requires_grad_(False)
    repeated_layers(model)[3].requires_grad_(True)
    said = measured(model).layers
    assert said[3] > said[2] == said[4]
