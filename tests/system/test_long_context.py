"""LongLoRA: shifted sparse attention in training, full attention elsewhere; embeddings and norms are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.shifted import plain
from helpers.training import make_strategy, make_trainer
from lowrank_dist import CausalLMModule, LoRA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.zero3.partition import gathered

#: The tiny LLaMA knows 128 positions.
LENGTH, GROUP, STEPS, ROWS, LR = 512, 128, 6, 6, 1e-2
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ALSO = ["*norm*", "model.embed_tokens.weight"]


def rows() -> Tensor:
    """Rows that repeat 150 tokens of their own, so that there is something to learn beyond a group."""
    part = torch.randint(3, 256, (ROWS, 150), generator=torch.Generator().manual_seed(3))
    return part.repeat(1, 4)[:, :LENGTH]


class Validated(L.Callback):
    """Keeps the trained parameters as they are while the model is evaluated."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = {n: p for n, p in pl_module.model.named_parameters() if p.requires_grad}
        with gathered(list(trained.values())):
            self.state = {name: value.detach().clone() for name, value in trained.items()}


def train(pretrained: Path, options: dict[str, Any]) -> tuple[list[float], float, dict[str, Tensor]]:
    module = CausalLMModule(
        str(pretrained), lr=LR, warmup_ratio=0.0, scheduler="constant", shifted_attention=GROUP, **options.pop("of", {})
    )
    group = ShardGroup()
    mine = rows().unflatten(0, (group.size, -1))[group.rank]
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in mine]
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    strategy = make_strategy(
        pretrained, adapter=LoraConfig(**ADAPTER), init=LoRA(), quantization=None, train_also=ALSO, **options
    )
    seen = Validated()
    trainer = make_trainer(strategy, steps=STEPS, callbacks=[Losses(), seen], check_val_every_n_epoch=STEPS)
    trainer.fit(module, DataLoader(data, batch_size=len(data)), DataLoader(data, batch_size=len(data)))
    return losses, float(trainer.callback_metrics["val_loss"]), seen.state


def reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **options: Any
) -> Any:
    """The pattern of the paper as a mask over all tokens."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return plain(query, key, value, GROUP).transpose(1, 2), None


def stock_losses(pretrained: Path, initial: dict[str, Tensor]) -> list[float]:
    """Stock transformers and PEFT in one process, with the written-out attention."""
    AttentionInterface.register("written_out", reference)
    base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32, attn_implementation="written_out")
    model = get_peft_model(base, LoraConfig(**ADAPTER)).train()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.data = initial[name.removeprefix("base_model.model.")]
        parameter.requires_grad_("lora_" in name or "norm" in name or "embed_tokens" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses, ids = [], rows()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(pretrained: Path, state: dict[str, Tensor], attention: str) -> float:
    base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32, attn_implementation=attention)
    model = get_peft_model(base, LoraConfig(**ADAPTER)).eval()
    _, unexpected = model.load_state_dict({f"base_model.model.{n}": v for n, v in state.items()}, strict=False)
    assert not unexpected
    with torch.no_grad():
        return float(model(input_ids=rows(), labels=rows(), use_cache=False).loss)


def initial(pretrained: Path) -> dict[str, Tensor]:
    """The factors A with which every run begins."""
    trainer = make_trainer(
        make_strategy(pretrained, adapter=LoraConfig(**ADAPTER), init=LoRA(), quantization=None, train_also=ALSO)
    )
    row = rows()[:1]
    module = CausalLMModule(str(pretrained), lr=0.0)
    trainer.fit(module, DataLoader([{"input_ids": one, "labels": one} for one in row]))
    factors = {n: p for n, p in module.model.named_parameters() if "lora_A" in n}
    with gathered(list(factors.values())):
        return {name: value.detach().clone() for name, value in factors.items()}


def test_loss_falls_on_rows_of_four_times_the_length(llama: Path) -> None:
    """On 1, 2 and 3 ranks as by a mask over all tokens in stock transformers; validation attends fully."""
    (factors,) = run_ranks(1, initial, llama)
    expected = stock_losses(llama, factors)
    assert expected[-1] < expected[0] - 0.3
    for ranks, options in ((1, {}), (2, {}), (3, {"gradient_checkpointing": False}), (1, {"compile_layers": "eager"})):
        losses, validated, state = run_ranks(ranks, train, llama, options)[0]
        assert losses == pytest.approx(expected, rel=2e-5)
        assert validated == pytest.approx(loss_of(llama, state, "sdpa"), rel=1e-5)
        assert validated != pytest.approx(loss_of(llama, state, "written_out"), rel=1e-3)
