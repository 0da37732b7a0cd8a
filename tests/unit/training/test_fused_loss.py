"""The loss without logits against transformers' own, in Triton's interpreter; and under ZeRO-3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma2Config

from helpers.ranks import run_ranks
from helpers.sft import tiny_llama
from helpers.training import make_strategy, tokens
from lowrank_dist.errors import InputError
from lowrank_dist.forecast.activations import fused_chunk
from lowrank_dist.training.fused_loss import FusedLoss
from lowrank_dist.training.module import CausalLMModule

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for tensors of the CPU")


def batch(rows: int = 2) -> dict[str, Tensor]:
    """Token ids, labels with gaps, their first among them."""
    ids = tokens()[0, :rows]
    labels = ids.clone()
    labels[:, ::5] = -100
    return {"input_ids": ids, "labels": labels}


def module_of(model: Any, **options: Any) -> CausalLMModule:
    module = CausalLMModule("unused", **options)
    module.model = model
    return module


class Logits(TorchDispatchMode):
    """The most rows that a product with so many columns had."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and out.shape[1] == self.columns:
            self.rows = max(self.rows, len(out))
        return out


def logits_at_a_time() -> tuple[int, int]:
    """Tokens whose logits there are at a time; what the forecast says."""
    model, whole = tiny_llama(), batch(9)
    config, tokens = model.config, whole["labels"].numel()
    with Logits(config.vocab_size) as found:
        module_of(model, fused_cross_entropy=True).loss(whole)
    return found.rows, fused_chunk(tokens, config.hidden_size, config.vocab_size)


def losses_and_gradients() -> list[tuple[Tensor, dict[str, Tensor], str]]:
    """Without and with, frozen and trained head, in fp32 and under autocast."""
    found = []
    for trained, dtype in ((False, None), (True, None), (False, torch.bfloat16)):
        torch.manual_seed(0)
        model = tiny_llama()
        model.lm_head.weight.requires_grad_(trained)
        for fused in (False, True):
            model.zero_grad()
            module = module_of(model, fused_cross_entropy=fused)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = module.loss(batch())
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found.append((loss.detach(), gradients, str(model(**batch()).logits.shape)))
    return found


def losses_of_capped_logits() -> tuple[float, float, str, tuple[int, ...]]:
    """Gemma 2 caps what its head gives. Losses without labels and with NaN, the error of others, logits afterwards."""
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
    )
    model = AutoModelForCausalLM.from_config(config)
    before, module, whole = model.loss_function, module_of(model, fused_cross_entropy=True), batch()
    nothing = module.loss({**whole, "labels": torch.full_like(whole["labels"], -100)})
    norm = model.model.norm.weight.detach()
    kept = norm.clone()
    norm.fill_(torch.nan)
    undefined = module.loss(whole)
    norm.copy_(kept)
    with pytest.raises(InputError) as refused:
        module.loss(whole)
    assert model.loss_function == before
    return float(nothing), float(undefined), str(refused.value), tuple(model(**whole).logits.shape)


class Witness(CausalLMModule):
    """Keeps its losses, and the shapes of what the model gives as logits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[float] = []
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, **batch: Tensor) -> Any:
        output = super().forward(**batch)
        self.shapes.append(tuple(output.logits.shape))
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss


def fit(pretrained: Path, fused: bool) -> tuple[list[float], list[tuple[int, ...]]]:
    """Losses under ZeRO-3, two batches a step, and the shapes of the logits; none if they were taken without.

    The first batch of the second rank has no labels.
    """
    module = Witness(str(pretrained), lr=1e-3, scheduler="constant", warmup_ratio=0, fused_cross_entropy=fused)
    trainer = L.Trainer(
        strategy=make_strategy(pretrained, quantization=None),  # NF4 would be decoded in the interpreter too
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        max_steps=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    rank, whole = torch.distributed.get_rank(), batch(12)
    examples = [{name: values[index] for name, values in whole.items()} for index in (*range(rank, 12, 2),) * 2]
    for example in examples[:3] if rank == 1 else []:
        example["labels"] = torch.full_like(example["labels"], -100)
    trainer.fit(module, DataLoader(examples, batch_size=3))
    return module.losses, module.shapes


def everything(pretrained: Path) -> tuple[Any, ...]:
    """In one call, as importing all of it takes longest."""
    return (
        (losses_and_gradients(), logits_at_a_time(), losses_of_capped_logits())
        if torch.distributed.get_rank() == 0
        else None,
        fit(pretrained, False),
        fit(pretrained, True),
    )


@pytest.fixture(scope="module")
def results(llama: Path) -> list[Any]:
    """What `everything` returns on each of 2 ranks, which have Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return run_ranks(2, everything, llama, fresh=True)


def test_the_loss_of_transformers(results: list[Any]) -> None:
    """fp32: sums in another order; under autocast the logits are rounded to bf16 (2^-9) on both ways.

    Under ZeRO-3 on 2 ranks, with a head tied to the embeddings, the losses of steps too.
    """
    found, (seen, said), _ = results[0][0]
    assert results[1][1][0][0] == 0
    assert seen == said < batch(9)["labels"].numel()
    for (loss, gradients, shape), (other, others, same), tolerance in zip(
        found[::2], found[1::2], (1e-5, 1e-5, 2e-2), strict=True
    ):
        assert float(other) == pytest.approx(float(loss), rel=tolerance / 10)
        assert set(others) == set(gradients)
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= tolerance * gradient.norm(), name
        assert same == shape  # the model is as it was
    for _, (plain, with_logits), (fused, without) in results:
        assert len(plain) == 4
        assert len(set(plain)) == 4
        assert fused == pytest.approx(plain, rel=1e-5)
        assert with_logits == [(3, 16, 256)] * 4
        assert without == [()] * 4


def test_capped_logits_are_refused(results: list[Any]) -> None:
    """At the first loss that shows it; those of a batch without labels, and NaN, are no reason and no proof."""
    _, _, (nothing, undefined, refusal, logits_again) = results[0][0]
    assert nothing == 0
    assert math.isnan(undefined)
    assert "Gemma2ForCausalLM scales or caps its logits" in refusal
    assert logits_again == (2, 16, 256)


def test_a_head_with_an_adapter_is_refused() -> None:
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is Linear, and must be a plain linear layer"):
        FusedLoss(model)


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        module_of(tiny_llama(), fused_cross_entropy=True).loss(batch())
