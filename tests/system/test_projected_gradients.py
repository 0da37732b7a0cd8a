"""GaLore and APOLLO under Lightning's own strategies: every parameter is trained with the state of few directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.ranks import run_ranks
from helpers.training import make_strategy, make_trainer, tokens
from lowrank_dist import CausalLMModule
from lowrank_dist.errors import InputError
from lowrank_dist.forecast import ModelShapes, RunSpec
from lowrank_dist.forecast.job import parameters
from lowrank_dist.forecast.memory import projected_state

RANK, STEPS = 8, 6
NAMES = ("galore", "apollo")


def module_of(pretrained: Path, name: str) -> CausalLMModule:
    options = {} if name == "adamw" else {"rank": RANK, "update_proj_gap": 2}
    rate = {"galore": 2e-2, "apollo": 5e-3, "adamw": 5e-3}[name]
    return CausalLMModule(
        str(pretrained), lr=rate, warmup_ratio=0.0, scheduler="constant", optimizer=name, optimizer_options=options
    )


class Recorded(CausalLMModule):
    losses: list[float]

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["train_loss"]))


def train(pretrained: Path, name: str, steps: int, save: Path | None, resume: Path | None) -> tuple[list[float], int]:
    """Losses of the steps, and the bytes that the optimizer's state keeps alive."""
    module = module_of(pretrained, name)
    module.__class__, module.losses = Recorded, []
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = tokens(1)[0].unflatten(0, (size, -1))[rank]
    trainer = make_trainer(DDPStrategy(process_group_backend="gloo"), steps=steps)
    data = DataLoader([{"input_ids": row, "labels": row} for row in mine], batch_size=len(mine))
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    if save is not None:
        trainer.save_checkpoint(save)
    return module.losses, sum(map(state_bytes, trainer.optimizers[0].state.values()))


def state_bytes(state: dict[str, Any]) -> int:
    held = [value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0]
    held += [found for found in [getattr(state.get("projector"), "ortho_matrix", None)] if found is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_with_a_small_state(llama: Path, tmp_path: Path, name: str) -> None:
    """On 1, 2 and 3 ranks alike, resumed as if never stopped, with the state that `plan` says."""
    pytest.importorskip(f"{name}_torch", reason=f"needs {name}-torch (the extra projected)")
    (whole, held), *_ = run_ranks(2, train, llama, name, STEPS, None, None)
    assert whole[-1] < whole[0] - 0.5
    (first, _), *_ = run_ranks(3, train, llama, name, 3, tmp_path / "saved.ckpt", None)
    (then, after), *_ = run_ranks(1, train, llama, name, STEPS, None, tmp_path / "saved.ckpt")
    assert first + then == pytest.approx(whole, rel=1e-4)
    (_, full), *_ = run_ranks(1, train, llama, "adamw", 1, None, None)
    job = RunSpec(
        nodes=1, gpus_per_node=2, stage=0, factor_dtype=torch.float32, optimizer=name, optimizer_rank=RANK, on_gpu=False
    )
    shapes = ModelShapes.of(llama, None)
    planned, _ = projected_state(shapes, job, parameters(shapes, job))
    assert held == after == planned
    assert full == 2 * 4 * sum(p.numel() for p in shapes.backbone.parameters())
    assert planned < 0.6 * full  # of a model whose embedding, which is not projected, is a fifth of it


def refused(pretrained: Path, name: str) -> str:
    with pytest.raises(InputError) as error:
        make_trainer(make_strategy(pretrained), steps=1).fit(
            module_of(pretrained, name), DataLoader([{"input_ids": tokens(1)[0, 0], "labels": tokens(1)[0, 0]}])
        )
    return str(error.value)


def test_shards_and_wrong_options_are_refused(llama: Path) -> None:
    for name in NAMES:
        (said,) = run_ranks(1, refused, llama, name)
        assert said.startswith(f"optimizer={name} projects gradients of whole matrices")
        assert f"use Lightning's DDPStrategy or one device (configs/method/{name}.yaml)" in said
        with pytest.raises(InputError, match=f"optimizer={name}: optimizer_options.rank=0 must be a positive number"):
            CausalLMModule(str(llama), optimizer=name, optimizer_options={"rank": 0})
