"""PiSSA to LoRA: an identity of factors, checked in fp64 and against merged models under stock PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_dist.checkpoint_io import CheckpointError
from lowrank_dist.convert import lora_config, read_adapter, to_lora, write_adapter

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_delta_is_exact(rows: int, columns: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    trained = {A: torch.randn(rank, columns, generator=g).double(), B: torch.randn(rows, rank, generator=g).double()}
    start = {name: torch.randn(t.shape, generator=g).double() for name, t in trained.items()}
    converted = to_lora(trained, start)
    assert converted[A].shape == (2 * rank, columns)
    assert converted[B].shape == (rows, 2 * rank)
    torch.testing.assert_close(
        converted[B] @ converted[A], trained[B] @ trained[A] - start[B] @ start[A], rtol=1e-12, atol=1e-12
    )


def test_whole_modules_pass_through() -> None:
    head = torch.randn(3, 4)
    assert to_lora({"base_model.model.classifier.weight": head}, {})["base_model.model.classifier.weight"] is head


@pytest.mark.parametrize("start", [{}, {A: torch.zeros(2, 3)}])
def test_a_missing_or_misshapen_initial_factor_is_refused(start: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"lora_A.weight \[4, 3\]: its initial value"):
        to_lora({A: torch.zeros(4, 3)}, start)


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def scalings(model: Any) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 10, "v_proj": 5}},
    ],
)
def test_every_module_keeps_its_scaling(llama: Path, rslora: bool, patterns: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, **patterns)
    before = scalings(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config))
    after_model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora_config(config))
    assert scalings(after_model) == pytest.approx(before, rel=1e-15)
    ranks = {layer.r["default"] for layer in lora_layers(after_model).values()}
    assert ranks == ({6, 8} if patterns else {8})


@pytest.mark.parametrize("rslora", [False, True])
def test_converted_adapter_on_the_base_equals_the_adapter_on_the_residual(
    llama: Path, tmp_path: Path, rslora: bool
) -> None:
    """Stock PEFT on both sides, fp32: rounding of sums of a few products, nothing else."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    config.init_lora_weights = False  # random, not zero
    scaling = 8 / (math.sqrt(4) if rslora else 4)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    tensors, start = {}, {}
    for name, module in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(module, part)["default"].weight
            start[f"{name}.{part}.weight"] = weight.detach().clone()
            weight.data += 0.1 * torch.randn_like(weight)
            tensors[f"{name}.{part}.weight"] = weight.detach().clone()
        residual = module.base_layer.weight
        residual.data -= scaling * start[f"{name}.lora_B.weight"] @ start[f"{name}.lora_A.weight"]
    write_adapter(tmp_path / "lora", to_lora(tensors, start), lora_config(config))
    converted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "lora")
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_survives_being_written_and_read(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["x"])
    write_adapter(tmp_path / "a", {A: torch.ones(2, 3), B: torch.zeros(5, 2)}, config)
    tensors, read = read_adapter(tmp_path / "a")
    assert torch.equal(tensors[A], torch.ones(2, 3))
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (2, 4, {"x"})


def test_an_empty_adapter_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refusing to write an adapter without tensors"):
        write_adapter(tmp_path / "a", {}, LoraConfig(r=2))
    assert not (tmp_path / "a").exists()


def test_a_truncated_adapter_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {A: torch.ones(2, 3)}, LoraConfig(r=2))
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(tmp_path / "a")
