"""Every optimizer of torch, transformers, bitsandbytes and PEFT in a fit, against one process of plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.optimizers import REFUSED, TRAINED, listed
from helpers.ranks import run_ranks
from helpers.training import CausalLM, initial_factors, loader, make_strategy, make_trainer, tokens
from lowrank_dist import AdapterCheckpoint, LoRA
from lowrank_dist.errors import InputError

CUT, STEPS = 2, 4
SEED = 5
#: Ranks of a run, and those that resume it.
RANKS = ((1, 3), (2, 1), (3, 2))
#: Those whose names differ in more than the memory that their state takes on CUDA.
KINDS = [name for name in sorted(TRAINED) if "Paged" not in name and "32bit" not in name]


def adapter() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])


class Stepped(CausalLM):
    """Under the optimizer of a name."""

    def __init__(self, pretrained: Path, name: str) -> None:
        super().__init__(pretrained)
        self.name = name

    def configure_optimizers(self) -> torch.optim.Optimizer:
        make = TRAINED[self.name] if self.name in TRAINED else REFUSED[self.name][0]
        return make(self.model)


def fit(pretrained: Path, name: str, first: int, **options: Any) -> tuple[list[float], Any]:
    L.seed_everything(SEED, verbose=False)
    module = Stepped(pretrained, name)
    strategy = make_strategy(pretrained, adapter=adapter(), init=LoRA(), quantization=None)
    trainer = make_trainer(strategy, steps=STEPS, **options.pop("trainer", {}))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS, first=first), **options)
    return module.losses, strategy


def begin(pretrained: Path, output: Path, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Losses of all runs, with a checkpoint of each at the cut, and A and B as they were before."""
    found: dict[str, list[float]] = {}
    for name in names:
        saving = AdapterCheckpoint(dirpath=output / name, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
        found[name], strategy = fit(pretrained, name, 0, trainer={"callbacks": [saving], "enable_checkpointing": True})
    return found, initial_factors(strategy)


def go_on(pretrained: Path, output: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Losses of all runs from their checkpoints."""
    return {name: fit(pretrained, name, CUT, ckpt_path=output / name / f"step={CUT}")[0] for name in names}


def in_one_process(pretrained: Path, name: str | None, factors: dict[str, Tensor]) -> list[float]:
    """Losses with the optimizer `name`, or without any."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    inject_adapter_in_model(adapter(), model)
    assert not model.load_state_dict(factors, strict=False).unexpected_keys
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if name is None else TRAINED[name](model)
    losses = []
    for ids in tokens(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(pretrained: Path, output: Path, ranks: tuple[int, int], names: Sequence[str]) -> None:
    """To fp32 rounding; 8-bit moments to their rounding, since blocks begin elsewhere on other ranks."""
    losses, factors = run_ranks(ranks[0], begin, pretrained, output, names, timeout=600)[0]
    rest = run_ranks(ranks[1], go_on, pretrained, output, names, timeout=600)[0]
    wrong, still = {}, in_one_process(pretrained, None, factors)
    for name in names:
        expected = in_one_process(pretrained, name, factors)
        assert max(abs(one - other) for one, other in zip(expected, still, strict=True)) > 3e-4, f"{name} moves little"
        tolerance = 1e-5 if "8bit" not in name else 2e-4
        for found, wanted in ((losses[name], expected), (rest[name], expected[CUT:])):
            if found != pytest.approx(wanted, rel=tolerance):
                wrong[name] = found, wanted
    assert not wrong


@pytest.mark.parametrize(("index", "ranks"), list(enumerate(RANKS)), ids=str)
def test_a_third_of_them(llama: Path, tmp_path: Path, index: int, ranks: tuple[int, int]) -> None:
    check(llama, tmp_path, ranks, KINDS[index::3])


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_all(llama: Path, tmp_path: Path, ranks: tuple[int, int]) -> None:
    check(llama, tmp_path, ranks, sorted(TRAINED))


def refused(pretrained: Path) -> dict[str, str]:
    found = {}
    for name in REFUSED:
        with pytest.raises(InputError) as error:
            fit(pretrained, name, 0)
        found[name] = str(error.value)
    return found


def test_the_others_are_refused_before_training(llama: Path) -> None:
    for name, message in run_ranks(2, refused, llama)[0].items():
        assert REFUSED[name][1] in message, name


def test_all_that_are_installed_are_among_them() -> None:
    assert listed() == {*TRAINED, *REFUSED}
