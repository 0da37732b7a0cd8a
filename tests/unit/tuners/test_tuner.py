"""What a tuner does, known before weights are read, against what PEFT makes of a real model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers.tuners import CASES
from lowrank_dist.errors import ModelError
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.tuners.tuner import Tuner

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_known_on_meta(llama: Path, name: str) -> None:
    planned = Tuner(CASES[name]()).plan(build_skeleton(llama))
    model = AutoModelForCausalLM.from_pretrained(llama).requires_grad_(False)
    backbone = set(model.buffers())
    model = get_peft_model(model, CASES[name]())
    trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n.removeprefix("base_model.model."): shape for n, shape in planned.trained.items()}
    assert shapes == {n: tuple(p.shape) for n, p in trained.items()}
    buffers = [(tuple(buffer.shape), buffer.dtype) for buffer in model.buffers() if buffer not in backbone]
    assert list(planned.buffers) == buffers


def test_a_target_that_the_model_lacks_is_refused(llama: Path) -> None:
    with pytest.raises(
        ModelError, match="VeraConfig cannot be applied to LlamaForCausalLM: .* Linear layers of this model"
    ):
        Tuner(peft.VeraConfig(target_modules=["no_such"])).plan(build_skeleton(llama))


def test_planning_changes_neither_the_model_nor_the_random_numbers(llama: Path) -> None:
    skeleton = build_skeleton(llama)
    names, before = list(dict(skeleton.named_modules())), torch.get_rng_state()
    Tuner(peft.VeraConfig(target_modules=["q_proj"])).plan(skeleton)
    assert list(dict(skeleton.named_modules())) == names
    assert torch.equal(torch.get_rng_state(), before)
