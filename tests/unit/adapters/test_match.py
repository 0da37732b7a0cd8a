"""What an adapter's tensors mean, told by its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import AdaLoraConfig, FourierFTConfig, LoHaConfig, LoraConfig, PeftConfig, PromptEncoderConfig, VeraConfig

from lowrank_dist.adapters.files import read_config
from lowrank_dist.adapters.match import check_same_meaning
from lowrank_dist.errors import CheckpointError

SAME: list[tuple[PeftConfig, PeftConfig]] = [
    (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"),
    ),
    (AdaLoraConfig(total_step=10, rank_pattern={"a": [True]}), AdaLoraConfig(total_step=20)),
    (PromptEncoderConfig(num_virtual_tokens=4, token_dim=64, num_layers=2), PromptEncoderConfig(num_virtual_tokens=4)),
    (VeraConfig(target_modules=["q_proj"]), VeraConfig(target_modules="q_proj")),
]
OTHER: list[tuple[PeftConfig, PeftConfig, str]] = [
    (LoraConfig(lora_alpha=4), LoraConfig(lora_alpha=64), r"lora_alpha=4 \(now 64\)"),
    (LoraConfig(), LoraConfig(use_rslora=True), r"use_rslora=False \(now True\)"),
    (LoraConfig(alpha_pattern={"q": 8}), LoraConfig(), r"alpha_pattern=\{'q': 8\} \(now \{\}\)"),
    (LoraConfig(trainable_token_indices=[1, 2]), LoraConfig(trainable_token_indices=[3, 4]), "trainable_token_indices"),
    (LoHaConfig(alpha=8), LoHaConfig(alpha=800), r"alpha=8 \(now 800\)"),
    (FourierFTConfig(random_loc_seed=1), FourierFTConfig(random_loc_seed=2), "random_loc_seed=1"),
    (VeraConfig(projection_prng_key=1), VeraConfig(projection_prng_key=2), "projection_prng_key=1"),
    (LoraConfig(), LoHaConfig(), r"peft_type=LORA \(now LOHA\)"),
]


def stored(config: PeftConfig, directory: Path) -> PeftConfig:
    config.save_pretrained(str(directory))
    return read_config(directory)


@pytest.mark.parametrize(("before", "now"), SAME)
def test_settings_that_tensors_do_not_depend_on(before: PeftConfig, now: PeftConfig, tmp_path: Path) -> None:
    check_same_meaning(stored(before, tmp_path), now, tmp_path)
    check_same_meaning(stored(now, tmp_path), now, tmp_path)


@pytest.mark.parametrize(("before", "now", "said"), OTHER, ids=[said.partition("=")[0] for *_, said in OTHER])
def test_the_same_tensors_would_be_another_update(
    before: PeftConfig, now: PeftConfig, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"the run that wrote it had .*{said}"):
        check_same_meaning(stored(before, tmp_path), now, tmp_path)
