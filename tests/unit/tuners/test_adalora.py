"""AdaLoRA's schedule, importance and penalty, against PEFT's own in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.tuners.adalora.allocation import add_means
from lowrank_dist.tuners.adalora.penalty import OrthogonalityPenalty
from lowrank_dist.tuners.adalora.schedule import BudgetSchedule, objection, objection_to_steps

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def config(**options: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return AdaLoraConfig(**{**defaults, "total_step": 40, "task_type": "CAUSAL_LM", **options})


def model(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A tiny LLaMA with PEFT's layers, Lambda not zero."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).to(dtype).requires_grad_(False).train()
    made = get_peft_model(backbone, config(**options))
    for name, parameter in made.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"tinit": 5, "tfinal": 7}, {"tinit": 3, "tfinal": 9, "deltaT": 4}, {"target_r": 6, "tfinal": 1}],
    ids=str,
)
def test_the_schedule_is_pefts(options: dict[str, Any]) -> None:
    mine = BudgetSchedule.of(config(**options))
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config(**options), 6 * 4, mine.target * 4
    for step in range(40):
        budget, chooses = allocator.budget_schedule(step)
        assert mine.budget(step, 4) == budget
        # PEFT chooses for the last time at `fixed_from`, and then only masks
        assert mine.chooses(step) == ((chooses and step < mine.fixed_from) or step == mine.fixed_from)
        assert mine.masks(step) == (chooses or step >= mine.fixed_from)
        assert mine.measures(step) == (step < mine.fixed_from)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("shape", "triplets"), [((5, 9), 0), ((9, 5), 1), ((5, 1), 0)])
def test_means_over_triplets_are_sums_over_shards(ranks: int, shape: tuple[int, int], triplets: int) -> None:
    whole = torch.rand(shape)
    scores = torch.zeros(5, dtype=torch.float64)
    partition = FlatPartition(numel=whole.numel(), world_size=ranks)
    for rank in range(ranks):
        start, stop = partition.bounds(rank)
        add_means(scores, whole.flatten()[start:stop], start, shape, triplets)
    torch.testing.assert_close(scores, whole.double().mean(1 - triplets), rtol=1e-12, atol=0)


def gradients(found: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}


def step(found: PeftModel, forward: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and the gradients of two batches whose losses were multiplied for backward."""
    found.zero_grad()
    loss = forward(input_ids=IDS, labels=IDS, use_cache=False).loss
    (loss * 0.3).backward()
    (forward(input_ids=IDS.flip(0, 1), labels=IDS, use_cache=False).loss * 4.5).backward()
    return loss.detach(), gradients(found)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_the_penalty_is_pefts(checkpointing: bool | None) -> None:
    """Value and gradient, whatever the loss is multiplied by, also where layers are computed again in backward."""
    found = model()
    expected = step(found, found.forward)
    OrthogonalityPenalty(0.5).add_to(found.get_base_model())
    if checkpointing is not None:
        found.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        found.get_base_model().enable_input_require_grads()
    torch.testing.assert_close(step(found, found.get_base_model()), expected, rtol=1e-5, atol=1e-7)


def test_the_penalty_is_of_training_and_of_a_loss() -> None:
    found = model()
    backbone = found.get_base_model()
    plain = backbone(input_ids=IDS, labels=IDS).loss
    (backbone(input_ids=IDS).logits.float() ** 2).mean().backward()
    without = gradients(found)
    OrthogonalityPenalty(0.5).add_to(backbone)
    found.zero_grad()
    (backbone(input_ids=IDS).logits.float() ** 2).mean().backward()
    torch.testing.assert_close(gradients(found), without)
    assert backbone(input_ids=IDS, labels=IDS).loss > plain + 0.1
    torch.testing.assert_close(backbone.eval()(input_ids=IDS, labels=IDS).loss, plain)


def test_the_penalty_is_computed_in_fp32() -> None:
    found = model(torch.bfloat16)
    fp32 = model()
    fp32.load_state_dict({name: t.float() for name, t in found.state_dict().items()})
    plain = found.get_base_model()(input_ids=IDS, labels=IDS).loss.detach()
    OrthogonalityPenalty(0.5).add_to(found.get_base_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = found.get_base_model()(input_ids=IDS, labels=IDS).loss.detach()
    assert isinstance(fp32.base_model, AdaLoraModel)
    with torch.no_grad():
        expected = fp32(input_ids=IDS, labels=IDS).loss - fp32.get_base_model()(input_ids=IDS, labels=IDS).loss
    assert float(added - plain) == pytest.approx(float(expected), rel=2e-2)


def test_objections() -> None:
    fits = config(tfinal=1)
    assert objection(fits) is None
    assert objection_to_steps(fits, 40) is None
    assert "this run has 30 optimizer steps; pass total_step=30" in str(objection_to_steps(fits, 30))
    for unknown in (-1, float("inf")):
        assert "no known number of optimizer steps; pass Trainer(max_steps=40)" in str(
            objection_to_steps(fits, unknown)
        )
    fits.tinit = 39  # set after PEFT has looked at it
    assert "tinit=39 and tfinal=1 leave no steps of total_step=40" in str(objection(fits))
    fits.tinit, fits.total_step = 0, None
    assert "leave no steps of total_step=None" in str(objection(fits))
