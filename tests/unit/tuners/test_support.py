"""Which configurations are put on top of the base, made from the weights, or refused."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest

from lowrank_dist.errors import InputError
from lowrank_dist.methods import LoRA, PiSSA
from lowrank_dist.tuners.support import is_for_peft, objection, remark

TARGETS: dict[str, Any] = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "init", "expected"),
    [
        (peft.LoraConfig(**TARGETS), None, False),
        (peft.LoraConfig(**TARGETS, bias="all"), PiSSA(), False),
        (peft.LoraConfig(**TARGETS, use_dora=True), LoRA(), False),
        (peft.LoraConfig(**TARGETS, lora_bias=True), LoRA(), True),
        (peft.VeraConfig(**TARGETS), None, True),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), None, True),
    ],
)
def test_peft_makes_what_is_not_made_from_the_weights(config: Any, init: Any, expected: bool) -> None:
    assert is_for_peft(config, init) is expected


@pytest.mark.parametrize(
    ("config", "init", "message"),
    [
        (peft.VeraConfig(**TARGETS), PiSSA(), "init=PiSSA.* adapter is a VeraConfig, which PEFT initialises"),
        (peft.LoraConfig(**TARGETS, lora_bias=True), None, "LoraConfig.lora_bias=True is .* pass init=LoRA"),
        (peft.LoraConfig(**TARGETS, lora_bias=True), PiSSA(), "leave lora_bias unset to train with init=PiSSA"),
    ],
)
def test_what_is_left_open_or_contradicts_is_refused(config: Any, init: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        is_for_peft(config, init)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.FrodConfig(**TARGETS), "use init=PiSSA"),
        (peft.LoraConfig(**TARGETS, init_lora_weights="pissa"), "init_lora_weights='pissa' .* leave .* unset"),
        (peft.LoraConfig(**TARGETS, kasa_config=peft.KasaConfig()), "KaSA takes its part off the frozen weights"),
        (peft.LoraConfig(**TARGETS, ensure_weight_tying=True), "ensure_weight_tying=True is not supported"),
        (peft.LoraConfig(**TARGETS, use_qalora=True, lora_bias=True), "would train an ordinary LoRA here; leave it"),
        (peft.LoraConfig(**TARGETS, lora_ga_config=peft.LoraGAConfig()), "those of init=LoRAGA"),
        (peft.AdamssConfig(**TARGETS), "clustering whole weights"),
        (peft.PveraConfig(**TARGETS, generator_seed=3), "generator_seed draws .* pass gradient_checkpointing=False"),
        (
            peft.LoraConfig(**TARGETS, monteclora_config=peft.MontecloraConfig()),
            "recomputations would differ",
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "pass gradient_checkpointing=False",
        ),
    ],
)
def test_a_refusal_names_the_remedy(config: Any, reason: str) -> None:
    found = objection(config, gradient_checkpointing=True)
    assert found is not None
    assert re.search(reason, found)


def test_what_depends_on_the_ranks_is_said() -> None:
    said = remark(peft.PolyConfig(**TARGETS, task_type="CAUSAL_LM", n_tasks=1))
    assert said is not None
    assert "losses vary with the number of ranks" in said
    assert remark(peft.VeraConfig(**TARGETS)) is None
