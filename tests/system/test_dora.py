"""DoRA on the sharded residual, from PiSSA's start and from zero, against stock PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.covering import covering
from helpers.ranks import run_ranks
from helpers.training import BATCHES, LR, ByStep, dense_state, loader, make_strategy, make_trainer, tokens
from helpers.tuners import logits
from lowrank_dist import NF4, LoRA, PiSSA
from lowrank_dist.layers.dora import DoraLinear

BEFORE, AFTER = 3, 2
STARTS: dict[str, Any] = {
    "pissa": {"init": PiSSA(), "quantization": None},
    "qpissa": {"init": PiSSA(quantization_iterations=2), "quantization": NF4()},
    "lora": {"init": LoRA(), "quantization": NF4()},
}


def dora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)


def train(pretrained: Path, options: dict[str, Any], steps: int, save: Path | None, resume: Path | None) -> Any:
    """Losses, and the weights before training."""
    strategy = make_strategy(pretrained, adapter=dora(), **options)
    module, trainer = ByStep(pretrained), make_trainer(strategy, steps=steps)
    data = loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), BATCHES)
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    assert sum(isinstance(layer, DoraLinear) for layer in module.model.modules()) == 14
    if save is not None:
        trainer.save_checkpoint(save)
    return module.losses, dense_state(strategy)


def train_stock(pretrained: Path, state: dict[str, Tensor], steps: int) -> tuple[list[float], Any]:
    """Losses of stock PEFT from the weights of `state`; magnitudes start as PEFT starts them for these weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32), dora()).train()
    inner = model.base_model.model
    inner.load_state_dict({n: value for n, value in state.items() if "magnitude" not in n}, strict=False)
    for layer in inner.modules():
        if hasattr(layer, "lora_magnitude_vector"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            layer.lora_magnitude_vector["default"].update_layer(
                base_layer=layer.base_layer, lora_A=a, lora_B=b, scaling=layer.scaling["default"]
            )
    trained = [p for n, p in model.named_parameters() if "lora" in n]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    losses = []
    for ids in tokens(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@covering(1, {"start": STARTS, "ranks": [(1, 2), (3, 1)]}, ids=str)
def test_trains_and_resumes_as_stock_peft(llama: Path, tmp_path: Path, start: str, ranks: tuple[int, int]) -> None:
    first, then = ranks
    save, options = tmp_path / "save", STARTS[start]
    losses, state = run_ranks(first, train, llama, options, BEFORE, save, None)[0]
    resumed, _ = run_ranks(then, train, llama, options, BEFORE + AFTER, None, save)[0]
    expected, _ = train_stock(llama, state, BEFORE + AFTER)
    assert losses + resumed == pytest.approx(expected, rel=1e-5)


def test_the_converted_adapter_is_a_dora_of_twice_the_rank_for_the_original(llama: Path, tmp_path: Path) -> None:
    """W_res + s B A = W + s (B A - B_0 A_0), whose rows have the same norms: the magnitudes stay."""
    save = tmp_path / "save"
    _, state = run_ranks(2, train, llama, STARTS["pissa"], BEFORE, save, None)[0]
    _, trained = train_stock(llama, state, BEFORE)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    converted = PeftModel.from_pretrained(base, save / "lora")
    config = converted.peft_config["default"]
    assert (config.r, config.use_dora) == (8, True)
    torch.testing.assert_close(logits(converted, ""), logits(trained, ""), rtol=0, atol=1e-4)
