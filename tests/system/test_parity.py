"""Training on 1 to 4 sharded ranks against one process without DeepSpeed that holds the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.covering import covering
from helpers.ranks import run_ranks
from helpers.training import STEPS, CausalLM, dense_state, fit, loader, make_strategy, make_trainer, train_plainly
from lowrank_dist import LoRA, PiSSA
from lowrank_dist.layers.adapted import AdaptedLinear

CHECKPOINTING = {
    "off": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
}


def train_sharded(pretrained: Path, precision: str, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    module, trainer = fit(pretrained, precision=precision, **options)
    return module.losses, dense_state(trainer.strategy)


@covering(1, {"checkpointing": CHECKPOINTING, "world_size": [1, 2, 3, 4]})
def test_losses_equal_those_of_one_process(llama: Path, world_size: int, checkpointing: str) -> None:
    """fp32, 1e-5 relative: only the order of sums differs, over the ranks and in the batched products."""
    results = run_ranks(world_size, train_sharded, llama, "32-true", CHECKPOINTING[checkpointing])
    losses, state = results[0]
    expected = train_plainly(llama, state)
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(other == losses for other, _ in results)


def test_accumulation_and_clipping_are_lightnings_own(llama: Path) -> None:
    """Two micro-batches of three on two ranks are the global batch of twelve; the norm is clipped over all ranks."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}
    losses, state = run_ranks(2, train_sharded, llama, "32-true", options)[0]
    expected = train_plainly(llama, state, clip=0.01)
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert means == pytest.approx(expected, rel=1e-5)


def train_folded(pretrained: Path, options: dict[str, Any]) -> tuple[list[float], int]:
    """Losses, and how many layers were computed as one product."""
    products, compute = [], AdaptedLinear.computed

    def computed(layer: AdaptedLinear, x: Tensor, *, fold: bool) -> Tensor:
        products.extend([layer] * fold)
        return compute(layer, x, fold=fold)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptedLinear, "computed", computed)
        return fit(pretrained, **options)[0].losses, len(products)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("when", ["always", "measured"])
def test_adapters_added_to_the_weight_change_no_loss(llama: Path, world_size: int, when: str) -> None:
    """fp32, 1e-5 relative, as without it; the head, which is not in a layer that is gathered whole, is a target too."""
    head = {"untie_embeddings": True, "adapter": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])}
    separate, products = run_ranks(world_size, train_folded, llama, head)[0]
    assert products == 0
    for checkpointing in CHECKPOINTING.values():
        options = {**head, **checkpointing, "fold_adapters": when}
        folded, products = run_ranks(world_size, train_folded, llama, options)[0]
        assert folded == pytest.approx(separate, rel=1e-5)
        assert products >= 3 * STEPS or when == "measured"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_adapters_added_to_the_weight_in_bf16(llama: Path, precision: str) -> None:
    """As `test_bf16_follows_fp32`, whose bound holds."""
    losses, state = run_ranks(2, train_sharded, llama, precision, {"fold_adapters": "always"})[0]
    assert losses == pytest.approx(train_plainly(llama, {name: t.float() for name, t in state.items()}), rel=1e-3)


class Descent(CausalLM):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def descend(pretrained: Path, micro_batches: int) -> list[float]:
    module = Descent(pretrained)
    trainer = make_trainer(make_strategy(pretrained), accumulate_grad_batches=micro_batches)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS, micro_batches))
    return torch.tensor(module.losses).view(-1, micro_batches).mean(1).tolist()


def test_accumulated_gradients_are_means(llama: Path) -> None:
    """With SGD, which does not forgive a factor as Adam does."""
    whole = run_ranks(1, descend, llama, 1)[0]
    assert whole[-1] != pytest.approx(whole[0], rel=1e-4)
    assert run_ranks(2, descend, llama, 3)[0] == pytest.approx(whole, rel=1e-5)


def train_with_validation(pretrained: Path) -> tuple[list[float], list[float]]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    module, measured = CausalLM(pretrained), []
    module.on_validation_end = lambda: measured.append(float(trainer.callback_metrics["val_loss"]))
    trainer = make_trainer(make_strategy(pretrained), steps=4, val_check_interval=2)
    trainer.fit(module, loader(rank, size, 4), loader(rank, size, 2))
    for stage in (trainer.validate, trainer.test):
        measured.append(stage(module, loader(rank, size, 2), verbose=False)[0]["val_loss"])
    return module.losses, measured


def test_validation_between_and_after_the_steps_changes_nothing(llama: Path) -> None:
    losses, measured = run_ranks(2, train_with_validation, llama)[0]
    assert losses == pytest.approx(run_ranks(2, train_sharded, llama, "32-true", {"steps": 4})[0][0], rel=1e-6)
    assert len(measured) == 2 + 3  # in fit, by the hook in validate, and the two results
    assert measured[-4:] == pytest.approx([measured[-1]] * 4)
    assert measured[0] != measured[1]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("fp32_norms", [False, True])
def test_bf16_follows_fp32(llama: Path, precision: str, fp32_norms: bool) -> None:
    """bf16 has 8 bits, unit rounding 2^-9 = 2e-3; the loss averages it over tokens (1e-4 seen)."""
    options = {"fp32_norms": fp32_norms}
    losses, state = run_ranks(2, train_sharded, llama, precision, options)[0]
    expected = train_plainly(llama, {name: t.float() for name, t in state.items()})
    assert losses == pytest.approx(expected, rel=1e-3)
    norms = {t.dtype for name, t in state.items() if "norm" in name}
    assert norms == {torch.float32 if fp32_norms else torch.bfloat16}


class Logits(CausalLM):
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def first_logits(pretrained: Path, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    module = Logits(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **options))
    batches = loader(trainer.global_rank, trainer.world_size, steps=1)
    trainer.validate(module, batches, verbose=False)
    return batches.dataset.tensors[0], module.logits


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("init", [PiSSA(), PiSSA(power_iterations=0), LoRA()])
def test_unquantized_step_0_is_the_original_model(llama: Path, world_size: int, init: Any) -> None:
    """W - B A + B A = W whatever the factors: only fp32 rounding of two sums remains."""
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for ids, logits in run_ranks(world_size, first_logits, llama, {"quantization": None, "init": init}):
        torch.testing.assert_close(logits, original(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [{"use_rslora": True}, {"lora_alpha": 32}, {"rank_pattern": {"q_proj": 7}}])
def test_step_0_is_the_original_model_under_any_scaling(llama: Path, adapter: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **adapter})
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for ids, logits in run_ranks(2, first_logits, llama, {"quantization": None, "adapter": config}):
        torch.testing.assert_close(logits, original(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
