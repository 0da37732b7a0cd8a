"""LoRA-XS and SVFT: only the cores are trained, losses are those of a plain process, and what is saved is a LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.training import LR, STEPS, CausalLM, dense_state, loader, make_strategy, make_trainer, tokens
from lowrank_dist import NF4, SVFT, AdapterCheckpoint, LoRAXS, convert_checkpoint, merge_checkpoint
from lowrank_dist.decomposition.walk import check_matrices
from lowrank_dist.errors import ModelError
from lowrank_dist.layers.frozen import ExtendedLinear
from lowrank_dist.methods import Method
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.storage.inspect import inspect

INIT = LoRAXS(core_std=1e-2)
BAND = SVFT(pattern="banded", off_diagonal=1)  # at r = 4, 4 + 3 + 3 entries
CASES = {"lora_xs": (INIT, (4, 4)), "svft": (BAND, (10,))}


class Evaluated(CausalLM):
    logits: Tensor

    def on_train_end(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.logits = self.model(input_ids=tokens()[0], use_cache=False).logits


def train(pretrained: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    strategy = make_strategy(pretrained, **options)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=STEPS)
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True)
    state: dict[str, Tensor] = {}

    class Before(Evaluated):
        def on_train_start(self) -> None:
            state.update(dense_state(strategy))

    module = Before(pretrained)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size))
    shapes = sorted(tuple(p.ds_shape) for p in module.parameters() if p.requires_grad)
    return {"losses": module.losses, "state": state, "logits": module.logits, "trained": shapes}


def train_plainly(pretrained: Path, state: dict[str, Tensor], layout: FactorLayout, **options: Any) -> list[float]:
    """The same weights, factors and cores in stock transformers + PEFT, one process."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", **options), model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            b, core = layer.lora_B["default"].weight, nn.Parameter(state[f"{name}.lora_B.default.core"].clone())
            layer.lora_B["default"] = ExtendedLinear(layout, b, {"core": core})
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".core", ".lora_magnitude_vector.default.weight")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for ids in tokens():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "world_size", "quantization"),
    [
        *[("lora_xs", world_size, quantization) for world_size in (1, 2, 3) for quantization in (None, NF4())],
        ("svft", 2, None),
        ("svft", 3, NF4()),
    ],
    ids=str,
)
def test_only_the_cores_are_trained_as_in_a_plain_process(
    llama: Path, tmp_path: Path, name: str, world_size: int, quantization: Any
) -> None:
    init, shape = CASES[name]
    result = run_ranks(world_size, train, llama, tmp_path, {"init": init, "quantization": quantization})[0]
    assert result["trained"] == [shape] * 14
    state = result["state"]
    cores = [tensor for name, tensor in state.items() if name.endswith(".core")]
    if init is INIT:
        assert 0.5e-2 < float(torch.stack(cores).std()) < 2e-2
    else:
        assert float(torch.stack(cores).abs().max()) == 0
    assert result["losses"] == pytest.approx(train_plainly(llama, state, init.layout), rel=1e-5)
    assert result["losses"][-1] != pytest.approx(result["losses"][0], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_saved_lora_fits_the_original_model(llama: Path, tmp_path: Path, name: str) -> None:
    init, shape = CASES[name]
    result = run_ranks(2, train, llama, tmp_path, {"init": init, "quantization": None})[0]
    directory = tmp_path / f"step={STEPS}" / "lora"
    names = load_file(directory / "adapter_model.safetensors")
    assert len(names) == 28
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    uniform = convert_checkpoint(directory.parent, tmp_path / "uniform", rank=4)
    assert uniform.energy.least == pytest.approx(1, abs=1e-12)
    for lora in (directory, uniform.path):
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, lora).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()[0]).logits, result["logits"], rtol=1e-4, atol=1e-5)
    checkpoint = tmp_path / f"step={STEPS}"
    assert inspect(checkpoint).facts["trained parameters"] == 14 * math.prod(shape)
    merged = AutoModelForCausalLM.from_pretrained(merge_checkpoint(checkpoint, tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens()[0]).logits, result["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [INIT, SVFT()], ids=str)
def test_magnitudes_of_dora_are_norms_of_what_the_cores_make(llama: Path, tmp_path: Path, init: Method) -> None:
    """The run begins at the model, goes on as a plain process does, and its ``lora/`` is a DoRA for the original."""
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", use_dora=True)
    options = {"init": init, "quantization": None, "adapter": adapter}
    result = run_ranks(2, train, llama, tmp_path, options)[0]
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = tokens()[0]
    with torch.no_grad():
        before = original(input_ids=ids, labels=ids).loss.item()
    assert result["losses"][0] == pytest.approx(
        before, rel=1e-3 if init is INIT else 1e-6
    )  # a core of 1e-2, or of zero
    assert result["losses"] == pytest.approx(
        train_plainly(llama, result["state"], init.layout, use_dora=True), rel=1e-5
    )
    with torch.no_grad():
        norms = original.model.layers[0].self_attn.q_proj.weight.norm(dim=1)
    magnitude = result["state"]["model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"]
    torch.testing.assert_close(magnitude, norms, rtol=5e-2 if init is INIT else 1e-6, atol=0)
    tuned = PeftModel.from_pretrained(original, tmp_path / f"step={STEPS}" / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, result["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [INIT, BAND], ids=str)
def test_embeddings_and_experts_are_refused(init: Method) -> None:
    from lowrank_dist.model.plan import Plan, PlannedMatrix

    shape: dict[str, Any] = {"rows": 8, "columns": 8, "input_first": True, "rank": 2, "scaling": 1.0}
    for kind in ("lookup", "wrapped"):
        plan = Plan(matrices=[PlannedMatrix(layer="e", key="e.weight", **shape, **{kind: True})])
        with pytest.raises(ModelError, match="linear layers only; drop it from the targets"):
            check_matrices(plan, init)
