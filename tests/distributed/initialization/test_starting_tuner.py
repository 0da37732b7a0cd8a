"""Training goes on from adapters of other types than LoRA, with the losses of stock PEFT in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import BATCHES, LR, loader, make_strategy, make_trainer, tokens
from helpers.tuners import CASES, Tuned
from lowrank_dist import PiSSA
from unit.export.test_tuned import draw

STEPS = 2
# PEFT warns of extensions that it builds, and of tied weights
pytestmark = pytest.mark.filterwarnings("ignore")


def train(pretrained: Path, adapter: Path, options: dict[str, Any], save: Path | None = None) -> list[float]:
    torch.manual_seed(1)  # another one than that of the run that wrote the adapter
    strategy = make_strategy(pretrained, **{"adapter": str(adapter), "init": None, "quantization": None, **options})
    module, trainer = Tuned(pretrained, "vera"), make_trainer(strategy, steps=STEPS)
    trainer.fit(module, loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), BATCHES))
    if save is not None:
        trainer.save_checkpoint(save)
    return module.losses


def train_stock(pretrained: Path, adapter: Path) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for ids in tokens(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["vera", "ia3", "shira", "lora_bias+norms", "trainable_tokens"])
def test_losses_of_stock_peft(llama: Path, tmp_path: Path, name: str) -> None:
    adapter = draw(llama, tmp_path / "adapter", CASES[name]())
    losses = run_ranks(2, train, llama, adapter, {}, tmp_path / "save")[0]
    assert losses == pytest.approx(train_stock(llama, adapter), rel=1e-5)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "save" / "adapter"))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


def test_what_does_not_fit(llama: Path, tmp_path: Path) -> None:
    """One error on all ranks, which names what is missing or would be left untrained."""
    vera = draw(llama, tmp_path / "vera", VeraConfig(r=8, target_modules=["q_proj"]))
    file = vera / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_b"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({k: v for k, v in whole.items() if k != key}, {}, "vera_lambda_b [64] is missing"),
        (whole | {key: torch.ones(3)}, {}, "vera_lambda_b [64] has shape [3]"),
        (whole | {"base_model.model.model.norm.weight": torch.ones(64)}, {}, "norm.weight would not be trained"),
        (whole, {"init": PiSSA()}, "makes a new adapter from the weights"),
    ]
    for tensors, options, text in cases:
        save_file(tensors, file)
        errors = run_ranks_catching(2, train, llama, vera, options)
        assert all(text in str(error) for error in errors), errors
    encoder = draw(llama, tmp_path / "encoder", CASES["p_tuning_mlp"]())
    prefix = draw(llama, tmp_path / "prefix", CASES["prefix_tuning"]())
    for adapter, text in ((encoder, "PEFT saves no"), (prefix, "does not work with gradient checkpointing")):
        errors = run_ranks_catching(1, train, llama, adapter, {"gradient_checkpointing": True})
        assert all(text in str(error) for error in errors), errors
