"""A signal during a validation: all ranks save and end within it, and the resumed run validates as if undisturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from helpers.ranks import run_ranks
from helpers.training import BATCHES, ByStep, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint
from lowrank_dist.cluster.signals import SIGNALS
from lowrank_dist.training.stopping import TERMINATED

#: An epoch has `BATCHES` batches and a validation as many.
STEPS = BATCHES + 2
Scores = dict[int, float]


class Validated(ByStep):
    """The last rank sends itself SIGTERM in the third batch of the validation after step `at`."""

    def __init__(self, pretrained: Path, at: int | None = None) -> None:
        super().__init__(pretrained)
        self.at, self.scores, self.batches = at, {}, 0

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        self.batches += 1
        is_last = self.trainer.global_rank == self.trainer.world_size - 1
        if self.trainer.global_step == self.at and index == 2 and is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_epoch_end(self) -> None:
        self.scores[self.trainer.global_step] = float(self.trainer.callback_metrics["val_loss"])


class Uneven(Validated):
    """Loses the frozen model's collectives, and so the need that ranks validate alike."""

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", float(self.trainer.global_step), sync_dist=True)
        if self.trainer.global_step == self.at and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    pretrained: Path,
    output: Path,
    module: Validated,
    every: int | None,
    accumulate: int = 1,
    filename: str = "{step}",
) -> Any:
    """Train `STEPS` steps or until the signal; the module and the exit status."""
    trainer = make_trainer(
        make_strategy(pretrained),
        steps=STEPS,
        callbacks=[AdapterCheckpoint(output, filename=filename, save_top_k=1, every_n_epochs=100)],
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        val_check_interval=every,
    )
    rank, size = trainer.global_rank, trainer.world_size
    validation = loader(rank, size, BATCHES)
    try:
        trainer.fit(module, loader(rank, size, BATCHES, accumulate), validation, ckpt_path="last")
    except SystemExit as error:
        SIGNALS.disarm()
        return error.code
    assert trainer.global_step == STEPS
    return 0


def interrupt(pretrained: Path, output: Path, at: int, every: int | None, accumulate: int) -> None:
    module = Validated(pretrained, at)
    assert run(pretrained, output, module, every, accumulate) == TERMINATED
    assert module.batches % BATCHES == 3  # not a batch more
    assert at not in module.scores
    assert [path.name for path in output.glob("[!.]*")] == [f"step={at}"]


def whole(pretrained: Path, output: Path, every: int | None, accumulate: int = 1) -> tuple[Scores, list[float]]:
    module = Validated(pretrained)
    assert run(pretrained, output, module, every, accumulate) == 0
    return module.scores, module.losses


@pytest.mark.parametrize(
    ("at", "every", "accumulate", "ranks"),
    [
        pytest.param(4, 4, 1, 2, id="within an epoch"),
        pytest.param(8, None, 1, 2, id="at the end of an epoch"),
        pytest.param(4, 8, 2, 2, id="with accumulation"),
        pytest.param(8, None, 1, 1, id="on fewer ranks"),
    ],
)
def test_an_interrupted_validation_is_repeated_whole(
    llama: Path, tmp_path: Path, at: int, every: int | None, accumulate: int, ranks: int
) -> None:
    scores, losses = run_ranks(2, whole, llama, tmp_path / "undisturbed", every, accumulate)[0]
    assert at in scores
    run_ranks(2, interrupt, llama, tmp_path / "out", at, every, accumulate)
    resumed, rest = run_ranks(ranks, whole, llama, tmp_path / "out", every, accumulate)[0]
    assert resumed == pytest.approx({step: score for step, score in scores.items() if step >= at}, abs=1e-5)
    assert rest == pytest.approx(losses[at * accumulate :], abs=1e-5)


def uneven(pretrained: Path, output: Path) -> None:
    rank = torch.distributed.get_rank()
    module = Uneven(pretrained, 2)
    trainer = make_trainer(make_strategy(pretrained), steps=STEPS, val_check_interval=2)
    validation = DataLoader(TensorDataset(torch.zeros(2 + rank, 1)))
    with pytest.raises(SystemExit):
        trainer.fit(module, loader(rank, 2, BATCHES), validation)
    SIGNALS.disarm()
    assert trainer.global_step == 3
    assert module.scores.keys() == {2}


def named_by_a_metric(pretrained: Path, output: Path) -> None:
    """The metric of half a validation is not the one that the name promises."""
    assert run(pretrained, output, Validated(pretrained, 4), 4, filename="{step}-{val_loss:.2f}") == TERMINATED
    assert [path.name for path in output.glob("[!.]*")] == ["preempted"]


def test_a_name_with_a_metric_waits_for_the_whole_validation(llama: Path, tmp_path: Path) -> None:
    run_ranks(2, named_by_a_metric, llama, tmp_path)


def test_ranks_that_validate_differently_end_after_the_next_step(llama: Path, tmp_path: Path) -> None:
    run_ranks(2, uneven, llama, tmp_path)
