"""Parameters of the model itself that are trained beside an adapter: norms, biases, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import BATCHES, LR, STEPS, ByStep, dense_state, fit, loader, make_strategy, make_trainer, tokens
from helpers.tuners import decoded, logits, reloaded, train_stock, train_tuned
from lowrank_dist import NF4, LoRA, PiSSA
from lowrank_dist.layers.frozen import FrozenLinear

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "all"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases."""
    return save_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2")


def train_pissa(pretrained: Path, save: Path) -> tuple[list[float], dict[str, Tensor], list[str]]:
    options = {"adapter": LoraConfig(**CONFIG), "init": PiSSA(), "quantization": None}
    module, trainer = fit(pretrained, train_also=["*norm*", "model.embed_tokens.weight"], **options)
    trainer.save_checkpoint(save)
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    return module.losses, dense_state(trainer.strategy), trained


def stock_model(pretrained: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)


@pytest.mark.parametrize("world_size", [1, 3])
def test_biases_norms_and_embeddings_train_with_pissa(qwen: Path, tmp_path: Path, world_size: int) -> None:
    """As in one process, and `lora/` brings stock PEFT to the same logits on the original model."""
    losses, state, trained = run_ranks(world_size, train_pissa, qwen, tmp_path / "save")[0]
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias"}
    model = get_peft_model(stock_model(qwen), LoraConfig(**CONFIG)).train()
    start = {f"base_model.model.{name}": value for name, value in state.items()}
    originals = {f"base_model.model.{n}": p.detach() for n, p in stock_model(qwen).named_parameters()}
    plain = {name.replace(".base_layer", ""): name for name, _ in model.named_parameters()}
    for name, value in originals.items():  # the state holds what training has left in them
        if "norm" in name or "embed" in name or name.endswith(".bias"):
            start[plain[name]] = value
    missing, unexpected = model.load_state_dict(start, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name]
    for name, parameter in model.named_parameters():
        wanted = "norm" in name or "embed" in name
        parameter.requires_grad_(parameter.requires_grad or wanted)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    expected = []
    for ids in tokens(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    converted = PeftModel.from_pretrained(stock_model(qwen), tmp_path / "save" / "lora")
    torch.testing.assert_close(logits(converted, ""), logits(model, ""), rtol=0, atol=1e-4)


def train_vera(pretrained: Path, options: dict[str, Any]) -> list[float]:
    return train_tuned(pretrained, "vera", **options)


def test_norms_train_beside_a_tuner_of_peft(llama: Path, tmp_path: Path) -> None:
    """Losses, the resumed run, and the adapter in stock PEFT."""
    save, options = tmp_path / "save", {"quantization": NF4(), "train_also": ["*norm*"]}
    losses = run_ranks(2, train_vera, llama, {**options, "steps": 3, "save": save})[0]
    losses += run_ranks(1, train_vera, llama, {**options, "steps": 5, "resume": save})[0]
    expected, _ = train_stock(llama, "vera", NF4(), 5, also="norm")
    assert losses == pytest.approx(expected, rel=1e-5)
    _, stock = train_stock(llama, "vera", NF4(), 3, also="norm")
    here, there = logits(reloaded(llama, "vera", NF4(), save / "adapter"), "vera"), logits(stock, "vera")
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4 * float(there.abs().max()))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*nrom*"], r"train_also: '\*nrom\*' matches no parameter"),
        (["*q_proj*"], r"train_also: '\*q_proj\*' matches model.layers.0.self_attn.q_proj.weight, which is adapted"),
    ],
)
def test_patterns_that_match_nothing_or_an_adapted_weight_are_refused(
    llama: Path, patterns: list[str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, fit_with, llama, patterns)


def fit_with(pretrained: Path, patterns: list[str]) -> None:
    fit(pretrained, train_also=patterns)


def train_query(pretrained: Path, options: dict[str, Any], steps: int, save: Path, resume: Path | None) -> list[float]:
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    strategy = make_strategy(pretrained, adapter=adapter, encode="all-linear", **options)
    module, trainer = ByStep(pretrained), make_trainer(strategy, steps=steps)
    data = loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), BATCHES)
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    trainer.save_checkpoint(save)
    frozen = [layer for layer in module.model.modules() if isinstance(layer, FrozenLinear)]
    assert len(frozen) == 14
    return module.losses


@pytest.mark.parametrize("init", [LoRA(), PiSSA(quantization_iterations=2)], ids=["qlora", "qpissa"])
def test_all_linear_layers_are_encoded_with_few_adapted(llama: Path, tmp_path: Path, init: Any) -> None:
    """QLoRA's losses are those of stock PEFT on a base of which every linear layer is decoded NF4; both resume."""
    options, saves = {"init": init, "quantization": NF4()}, [tmp_path / name for name in ("first", "then")]
    losses = run_ranks(2, train_query, llama, options, 3, saves[0], None)[0]
    losses += run_ranks(1, train_query, llama, options, 5, saves[1], saves[0])[0]
    assert losses == pytest.approx(run_ranks(3, train_query, llama, options, 5, tmp_path / "whole", None)[0], rel=1e-5)
    if isinstance(init, LoRA):
        base = decoded(llama, NF4(), "")
        with torch.no_grad():
            before = PeftModel.from_pretrained(base, saves[0] / "adapter")(input_ids=tokens(4)[3], labels=tokens(4)[3])
        assert losses[3] == pytest.approx(float(before.loss), rel=1e-5)
