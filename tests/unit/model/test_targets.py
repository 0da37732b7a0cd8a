"""What PEFT adapts of mixtures of experts, and what is said of the rest."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.models import ARCHITECTURES
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.skeleton import inject_adapter, meta_parameters

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 80}
_DEEPSEEK = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
SIZES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "qwen2_moe": {**_HEADS, "num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
    "deepseek_v3": {
        **{**_HEADS, **_DEEPSEEK, "moe_intermediate_size": 24, "first_k_dense_replace": 0},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def skeleton(architecture: str) -> PreTrainedModel:
    with meta_parameters():
        config = AutoConfig.for_model(architecture, **{**SIZES[architecture], "num_hidden_layers": 1})
        return AutoModelForCausalLM.from_config(config)


def adapted(
    architecture: str, caplog: pytest.LogCaptureFixture, **options: Any
) -> tuple[dict[str, int], list[str], Any]:
    """Ranks by the names of what is adapted in the layer, what was logged, and the configuration afterwards."""
    backbone, config = skeleton(architecture), LoraConfig(r=4, lora_alpha=4, **options)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter(backbone, config)
    ranks = {
        plain_name(name).removeprefix("model.layers.0.")
        + (f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""): layer.r["default"]
        for name, layer in backbone.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    return ranks, [record.getMessage() for record in caplog.records], config


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_all_linear_adapts_experts_and_no_routers(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT doubles the rank of two projections that transformers has joined."""
    ranks, said, config = adapted(architecture, caplog, target_modules="all-linear")
    assert {name: rank for name, rank in ranks.items() if "attn" not in name} == {
        "mlp.experts.gate_up_proj": 8,
        "mlp.experts.down_proj": 4,
    }
    assert said == [
        'target_modules="all-linear" leaves 1 routers out, such as model.layers.0.mlp.gate.weight; name their weights '
        "in target_parameters to adapt them"
    ]
    assert config.target_parameters == ["down_proj", "gate_up_proj"]


def test_a_router_by_name_is_adapted(caplog: pytest.LogCaptureFixture) -> None:
    options = {"target_modules": "all-linear", "target_parameters": ["mlp.gate.weight"]}
    ranks, said, _ = adapted("mixtral", caplog, **options)
    assert ranks["mlp.gate.weight"] == 4
    assert not said


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen2_moe"])
def test_stacked_experts_that_all_linear_leaves_out_are_named(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    ranks, said, _ = adapted(architecture, caplog, target_modules="all-linear")
    assert not any(".experts." in name for name in ranks)
    assert said[-1] == (
        'target_modules="all-linear" leaves 2 stacked parameters out, such as model.layers.0.mlp.experts.gate_up_proj; '
        "experts are adapted by target_parameters=['experts.gate_up_proj', 'experts.down_proj']"
    )


@pytest.mark.parametrize("modules", ["all-linear", ["o_proj", "gate_proj", "up_proj", "down_proj"]])
def test_shared_experts_that_peft_passes_over_are_named(modules: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Their names mean the stacked experts since transformers 5; as parameters they are adapted."""
    ranks, said, _ = adapted("deepseek_v3", caplog, target_modules=modules)
    assert not any("shared" in name for name in ranks)
    assert said[-1].endswith(
        "leaves 3 linear layers of these names frozen, such as model.layers.0.mlp.shared_experts.gate_proj; name their "
        "weights (shared_experts.gate_proj.weight) in target_parameters to adapt them"
    )
    shared = ["shared_experts.gate_proj.weight"]
    ranks, _, _ = adapted("deepseek_v3", caplog, target_modules=["o_proj"], target_parameters=shared)
    assert ranks["mlp.shared_experts.gate_proj.weight"] == 4


def test_ranks_of_experts_by_pattern(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT warns that it ignores patterns of parameters, which it does not; those that match nothing are named."""
    patterns = {"experts.gate_up_proj": 3, "experts.down_proj": 2, "no_such_proj": 5}
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": patterns}
    ranks, said, _ = adapted("gpt_oss", caplog, **options)
    assert ranks == {"self_attn.q_proj": 4, "mlp.experts.gate_up_proj": 3, "mlp.experts.down_proj": 2}
    assert said == ["rank_pattern and alpha_pattern: nothing that is adapted matches no_such_proj"]
