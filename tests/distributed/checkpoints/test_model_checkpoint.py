"""The manners of `ModelCheckpoint`: of `AdapterCheckpoint`, and of Lightning's own under the strategy."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from helpers.loggers import RecordingLogger
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.sft import byte_level_tokenizer, write_jsonl
from helpers.training import ByStep, CausalLM, loader, make_strategy, make_trainer, recorded
from lowrank_dist import AdapterCheckpoint, LoRA
from lowrank_dist.checkpoints import saving
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.data.datamodule import SFTDataModule

PLAIN = {"init": LoRA(), "quantization": None}
BOTH = pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint], ids=lambda kind: kind.__name__)
Kind = type[ModelCheckpoint]
STEPS = 8


class Scored(ByStep):
    """Validation gives the scores it is told to give."""

    scores = (3.0, 1.0, 2.0, 5.0)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("score", torch.tensor(self.scores[self.trainer.global_step // 2 - 1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Odd(Callback):
    """With a state that JSON does not know."""

    STATE: ClassVar[dict[Any, Any]] = {
        "tensors": [torch.arange(3), torch.tensor(2.5, dtype=torch.bfloat16)],
        "tuple": (1, ("a", None)),
        7: {0.5: True, (1, 2): float("inf")},
        "set": {1, 2},
        "ordered": OrderedDict(b=1, a=2),
    }
    loaded: dict[Any, Any] | None = None

    def state_dict(self) -> dict[Any, Any]:
        return dict(self.STATE)

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.loaded = state


def names(directory: Path) -> list[str]:
    return sorted(path.name.removesuffix(".ckpt") for path in directory.iterdir())


@alone
def save_the_best(pretrained: Path, output: Path, checkpoint: Path | None) -> list[str]:
    """Four steps, the first two of which count; or the rest, while rank 1 does not see what was saved."""
    best = AdapterCheckpoint(output, "{step}", monitor="score", save_top_k=1)
    trainer = make_trainer(
        make_strategy(pretrained, **PLAIN),
        steps=STEPS if checkpoint else STEPS // 2,
        callbacks=[best],
        enable_checkpointing=True,
        val_check_interval=2,
    )
    batches, late = loader(trainer.global_rank, trainer.world_size, STEPS), checkpoint and trainer.global_rank == 1
    with patch("lowrank_dist.callbacks.adapter_checkpoint.is_ours", lambda _: False) if late else nullcontext():
        scores = loader(trainer.global_rank, trainer.world_size, 1)
        trainer.fit(Scored(pretrained), batches, scores, ckpt_path=checkpoint)
    return [Path(path).name for path in best.best_k_models]


def test_ranks_keep_one_book_of_what_is_best(llama: Path, tmp_path: Path) -> None:
    """A shared file system shows a checkpoint late on one rank: it must not save alone, which would wait for ever."""
    output = tmp_path / "out"
    assert run_ranks(2, save_the_best, llama, output, None) == [["step=4"]] * 2
    assert run_ranks(2, save_the_best, llama, output, output / "step=4") == [["step=4"]] * 2
    assert names(output) == ["step=4"]


# -- when, which, and who is told -------------------------------------------------------------------------------------


def save_in_all_ways(pretrained: Path, output: Path, kind: Kind, checkpoint: Path | None) -> dict[str, Any]:
    """Four steps, or from `checkpoint` the other four."""
    best = kind(output / "best", "{step}", monitor="score", save_top_k=2, save_last="link")
    often = kind(output / "often", "{epoch}", every_n_train_steps=3, save_top_k=-1, save_last=True)
    always = kind(output / "always", "{step}", train_time_interval=timedelta(0), save_top_k=-1)
    stopping = EarlyStopping("score", patience=3)
    odd, logger, rates = Odd(), RecordingLogger(), LearningRateMonitor()
    trainer = make_trainer(
        make_strategy(pretrained, **PLAIN),
        steps=STEPS if checkpoint else STEPS // 2,
        callbacks=[best, often, always, odd, stopping, rates],
        enable_checkpointing=True,
        val_check_interval=2,
        log_every_n_steps=1,
    )
    trainer.loggers = [logger]
    module = Scored(pretrained, output / "losses")
    seen: dict[str, Any] = {}

    def begin() -> None:
        seen["step"] = trainer.global_step
        seen["best"] = (best.best_model_score, Path(best.best_model_path).name, len(best.best_k_models))
        seen["waited"] = stopping.wait_count

    module.on_train_start = begin
    batches = loader(trainer.global_rank, trainer.world_size, STEPS)
    trainer.fit(module, batches, loader(trainer.global_rank, trainer.world_size, 1), ckpt_path=checkpoint)
    if checkpoint:
        assert str(odd.loaded) == str({**Odd.STATE, "ordered": dict(Odd.STATE["ordered"])})  # types and values
    return {**seen, "told": logger.told, "metrics": logger.metrics, "score": best.best_model_score}


@BOTH
def test_intervals_bests_links_and_loggers(llama: Path, tmp_path: Path, kind: Kind) -> None:
    whole = run_ranks(2, save_in_all_ways, llama, tmp_path, kind, None)
    ours, end = kind is AdapterCheckpoint, kind.FILE_EXTENSION
    assert names(tmp_path / "best") == ["last", "step=2", "step=4"]
    assert (tmp_path / "best" / f"last{end}").readlink() == Path(f"step=4{end}")
    assert names(tmp_path / "often") == ["epoch=0", *(["epoch=1"] if ours else []), "last"]
    assert names(tmp_path / "always") == ["step=1", "step=2", "step=3", "step=4"]
    last = json.loads((tmp_path / "often" / f"last{end}" / "lowrank_dist.json").read_text())
    assert last["step"] == (4 if ours else 3)
    saved = sorted(
        [f"best/step={step}{end}" for step in (2, 4)]
        + [f"always/step={step}{end}" for step in (1, 2, 3, 4)]
        + [f"often/epoch=0{end}", f"often/last{end}"]
        + (["often/epoch=1", "often/last"] if ours else [])
    )
    assert sorted(whole[0]["told"]) == saved
    assert whole[1]["told"] == []
    assert "lr-AdamW" in whole[0]["metrics"]

    rest = run_ranks(2, save_in_all_ways, llama, tmp_path, kind, tmp_path / "best" / f"last{end}")  # a symbolic link
    assert rest[0]["step"] == 4
    assert rest[0]["best"] == (1.0, f"step=4{end}", 2)
    assert rest[0]["waited"] == 0
    assert names(tmp_path / "best") == ["last", "step=4", "step=6"]  # 5.0 is not among the best, 3.0 no longer
    assert (tmp_path / "best" / f"last{end}").readlink() == Path(f"step=6{end}")
    assert rest[0]["score"] == 1.0
    assert len(recorded(tmp_path / "losses")) == STEPS


def accumulate(pretrained: Path, output: Path, checkpoint: Path | None) -> list[float]:
    steps = AdapterCheckpoint(output / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    # batches take longer than the interval: it ends in the middle of accumulations too
    timed = AdapterCheckpoint(output / "timed", "{step}", train_time_interval=timedelta(seconds=0.02), save_top_k=-1)
    module = CausalLM(pretrained)
    module.on_train_batch_start = lambda *_: time.sleep(0.02)
    trainer = make_trainer(
        make_strategy(pretrained, **PLAIN),
        steps=4,
        callbacks=[steps, timed],
        enable_checkpointing=True,
        accumulate_grad_batches=3,
    )
    first = 2 if checkpoint else 0
    batches = loader(trainer.global_rank, trainer.world_size, micro_batches=3, first=first)
    trainer.fit(module, batches, ckpt_path=checkpoint)
    return module.losses


def test_nothing_is_saved_in_the_middle_of_an_accumulation(llama: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, accumulate, llama, tmp_path, None)[0]
    for way in ("steps", "timed"):
        assert names(tmp_path / way) == ["step=1", "step=2", "step=3", "step=4"]
        for step in range(1, 5):
            state = TrainingCheckpoint(tmp_path / way / f"step={step}").state()
            assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 3 * step
    rest = run_ranks(2, accumulate, llama, tmp_path / "rest", tmp_path / "timed" / "step=2")[0]
    assert rest == whole[6:]


# -- by hand ----------------------------------------------------------------------------------------------------------


def save_by_hand(pretrained: Path, output: Path) -> dict[str, Tensor]:
    module = ByStep(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **PLAIN), steps=3)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size))
    trainer.save_checkpoint(output / "whole")
    trainer.save_checkpoint(output / "weights", weights_only=True)
    return trainer.strategy.lightning_module_state_dict()


def go_on_by_hand(pretrained: Path, output: Path, checkpoint: Path) -> None:
    trainer = make_trainer(make_strategy(pretrained, **PLAIN))
    module = ByStep(pretrained, output / "losses")
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), ckpt_path=checkpoint)


def test_saving_by_hand(llama: Path, tmp_path: Path) -> None:
    state, other = run_ranks(2, save_by_hand, llama, tmp_path)
    assert other == {}
    for path in ("whole", "weights"):
        adapter = load_file(tmp_path / path / "adapter" / "adapter_model.safetensors")
        assert len(adapter) == len(state) == 28
        for name, value in state.items():
            name = name.removeprefix("model.").replace(".default", "")
            assert torch.equal(value, adapter[f"base_model.model.{name}"])
    assert (tmp_path / "whole" / "optimizer.safetensors").exists()
    assert not (tmp_path / "weights" / "optimizer.safetensors").exists()
    (tmp_path / "link").symlink_to("whole")
    run_ranks(2, go_on_by_hand, llama, tmp_path, tmp_path / "link")
    assert list(recorded(tmp_path / "losses")) == [3, 4]


# -- exceptions -------------------------------------------------------------------------------------------------------


class Failing(ByStep):
    who: tuple[int, ...] = ()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.trainer.global_step == 3 and self.trainer.global_rank in self.who:
            raise RuntimeError("the user's own error")
        return super().training_step(batch, index)


@alone
def fail(pretrained: Path, output: Path, kind: Kind, who: tuple[int, ...], checkpoint: Path | None = None) -> None:
    saving.MEETING = timedelta(seconds=3)
    callback = kind(output / "out", "{step}", every_n_train_steps=100, save_on_exception=True)
    module = Failing(pretrained, output / "losses")
    module.who = who
    trainer = make_trainer(make_strategy(pretrained, **PLAIN), callbacks=[callback], enable_checkpointing=True)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), ckpt_path=checkpoint)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step of a run in which nobody raises."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, fail, llama, output, AdapterCheckpoint, ())
    return recorded(output / "losses")


@BOTH
def test_an_exception_on_all_ranks_is_saved(
    llama: Path, undisturbed: dict[int, float], tmp_path: Path, kind: Kind
) -> None:
    for _, error in run_ranks_catching(2, fail, llama, tmp_path, kind, (0, 1)):
        assert "the user's own error" in str(error).splitlines()[-1]
    checkpoint = tmp_path / "out" / f"step=3{kind.FILE_EXTENSION}"
    run_ranks(2, fail, llama, tmp_path, kind, (), checkpoint)
    assert recorded(tmp_path / "losses") == undisturbed


@BOTH
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_on_one_rank_hangs_nobody(llama: Path, tmp_path: Path, kind: Kind, who: int) -> None:
    outcomes = run_ranks_catching(2, fail, llama, tmp_path, kind, (who,))
    assert "the user's own error" in str(outcomes[who][1])
    assert outcomes[1 - who][1] is not None
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# -- the position in the data -----------------------------------------------------------------------------------------

EXAMPLES = 24


class Watched(CausalLM):
    """Losses and examples of every batch; of all ranks where they bring them together."""

    def __init__(self, pretrained: Path, fails_at: int | None) -> None:
        super().__init__(pretrained)
        self.seen: list[list[int]] = []
        self.fails_at = fails_at

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if index == self.fails_at:
            raise RuntimeError("the user's own error")
        assert self.training
        rows: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(rows, [tuple(row[:8]) for row in batch["input_ids"].tolist()])
        self.seen.append([row for rank in rows for row in rank])
        loss = self.model(**batch, use_cache=False).loss
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        self.losses.append(float(mean) / self.trainer.world_size)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val_loss", self.model(**batch, use_cache=False).loss, sync_dist=True)


def tune(
    base: Path,
    output: Path,
    batch_size: int,
    accumulated: int = 1,
    checkpoint: Path | None = None,
    fails_at: int | None = None,
    validated: bool = False,
    steps: int = 12,
) -> tuple[list[list[int]], list[float]]:
    """Examples and losses of every step, ``accumulated`` batches together."""
    callbacks = [
        AdapterCheckpoint(output / "steps", "{step}", every_n_train_steps=4, save_top_k=-1, save_on_exception=True),
        AdapterCheckpoint(output / "batches", "{step}", every_n_train_steps=6, save_top_k=-1),
        AdapterCheckpoint(
            output / "epochs", "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=not validated
        ),
    ]
    train = str(base / "train.jsonl")
    data = SFTDataModule(str(base), train, train if validated else None, batch_size=batch_size)
    module = Watched(base, fails_at)
    trainer = make_trainer(
        make_strategy(base, **PLAIN),
        steps=steps,
        callbacks=callbacks,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulated,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    seen = [list(chain(*module.seen[at : at + accumulated])) for at in range(0, len(module.seen), accumulated)]
    return seen, torch.tensor(module.losses).view(-1, accumulated).mean(1).tolist()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[int]], list[float]]:
    """A model with its data, all examples with as many trained tokens, and a run of two epochs of six steps on it."""
    directory = tmp_path_factory.mktemp("tuned")
    base = save_checkpoint(directory / "base", "llama", vocab_size=512)
    byte_level_tokenizer().save_pretrained(base)
    write_jsonl(
        base / "train.jsonl", [{"prompt": f"{i:02d} what?", "completion": " It is four."} for i in range(EXAMPLES)]
    )
    seen, losses = run_ranks(2, tune, base, directory / "out", 2)[0]
    return base, directory / "out", seen, losses


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulated", "checkpoint", "step"),
    [
        (1, 4, 1, "steps/step=4", 4),
        (2, 1, 2, "steps/step=8", 8),
        (4, 1, 1, "epochs/step=6", 6),
        (1, 2, 2, "batches/step=6", 6),
    ],
)
def test_every_example_once_in_the_same_order(
    tuned: tuple[Path, Path, list[list[int]], list[float]],
    tmp_path: Path,
    ranks: int,
    batch_size: int,
    accumulated: int,
    checkpoint: str,
    step: int,
) -> None:
    """On other numbers of ranks and with other batch sizes, from the middle of an epoch and from its end."""
    base, output, seen, losses = tuned
    assert len(seen) == 12
    for epoch in (seen[:6], seen[6:]):
        assert len({example for one in epoch for example in one}) == EXAMPLES
    assert seen[:6] != seen[6:]
    then, rest = run_ranks(ranks, tune, base, tmp_path, batch_size, accumulated, output / checkpoint)[0]
    assert [set(one) for one in then] == [set(one) for one in seen[step:]]
    assert rest == pytest.approx(losses[step:], rel=1e-4)


def test_resuming_from_the_validation_at_the_end_of_an_epoch(
    tuned: tuple[Path, Path, list[list[int]], list[float]], tmp_path: Path
) -> None:
    base, _, seen, losses = tuned
    run_ranks(2, tune, base, tmp_path, 2, 1, None, None, True)
    checkpoint = tmp_path / "epochs" / "step=6"
    then, rest = run_ranks(2, tune, base, tmp_path / "rest", 2, 1, checkpoint, None, True)[0]
    assert then == seen[6:]
    assert rest == losses[6:]


@pytest.mark.parametrize("validated", [False, True])
def test_a_run_that_has_ended_is_extended(
    tuned: tuple[Path, Path, list[list[int]], list[float]], tmp_path: Path, validated: bool
) -> None:
    """``max_steps`` ended it in the middle of an epoch, whose other examples come next."""
    base, _, seen, losses = tuned
    run_ranks(2, tune, base, tmp_path, 2, 1, None, None, validated, 3)
    checkpoint = tmp_path / "steps" / "step=3"  # not one of its interval
    then, rest = run_ranks(1, tune, base, tmp_path / "rest", 4, 1, checkpoint, None, validated)[0]
    assert [set(one) for one in then] == [set(one) for one in seen[3:]]
    assert rest == pytest.approx(losses[3:], rel=1e-4)


def test_accumulated_gradients_are_a_mean(
    tuned: tuple[Path, Path, list[list[int]], list[float]], tmp_path: Path
) -> None:
    """Adam would not tell a factor, but clipping, weight decay and resumed moments would."""
    base, output, *_ = tuned
    run_ranks(1, tune, base, tmp_path, 1, 4)
    moments, whole = (load_file(path / "steps/step=4/optimizer.safetensors") for path in (tmp_path, output))
    for name in whole:
        torch.testing.assert_close(moments[name], whole[name], rtol=1e-3, atol=1e-5)


def test_an_exception_loses_no_example(tuned: tuple[Path, Path, list[list[int]], list[float]], tmp_path: Path) -> None:
    """Raised in the second batch of the third step: what that step had seen is seen again."""
    base, _, seen, losses = tuned
    for _, error in run_ranks_catching(2, tune, base, tmp_path, 1, 2, None, 5):
        assert "the user's own error" in str(error)
    then, rest = run_ranks(2, tune, base, tmp_path / "rest", 1, 2, tmp_path / "steps" / "step=2")[0]
    assert [set(one) for one in then] == [set(one) for one in seen[2:]]
    assert rest == pytest.approx(losses[2:], rel=1e-4)
