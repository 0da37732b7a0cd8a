"""Killed ranks and full disks while a training run saves: what was complete stays, nobody hangs, the run goes on."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.faults import full_disk_at, kill_at, little_room_at
from helpers.loggers import RecordingLogger
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.staging import RANDOM
from helpers.training import BATCHES, ByStep, loader, make_strategy, make_trainer, recorded
from lowrank_dist import AdapterCheckpoint, LoRA
from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.storage.beside import exclusive
from lowrank_dist.storage.layout import MANIFEST, sealed
from lowrank_dist.storage.lock import Lock
from lowrank_dist.storage.verify import file_digest

STEPS = 16


class Deadly(ByStep):
    """Ends as by kill -9 on rank 1, in the middle of a step."""

    last_step: int | None = None

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.trainer.global_step == self.last_step and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)


def train(
    pretrained: Path,
    output: Path,
    *,
    steps: int = STEPS,
    callback: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    die_in_step: int | None = None,
) -> dict[str, Any]:
    """Train from the newest checkpoint in `output` on, without a decomposition unless `strategy` says so."""
    options = {"dirpath": output, "filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1}
    checkpoint = AdapterCheckpoint(**{**options, **(callback or {})})
    module = Deadly(pretrained, output.with_suffix(".losses"))
    module.last_step = die_in_step
    begun: list[int] = []
    module.on_train_start = lambda: begun.append(trainer.global_step)
    logger = RecordingLogger()
    trainer = make_trainer(
        make_strategy(pretrained, **(strategy or {"init": LoRA(), "quantization": None})),
        steps=steps,
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )
    trainer.loggers = [logger]
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lowrank_dist").addHandler(handler)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, BATCHES), ckpt_path="last")
    logging.getLogger("lowrank_dist").removeHandler(handler)
    return {"begun": begun[0], "best": checkpoint.best_model_path, "told": logger.told, "said": said}


def train_with(pretrained: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    return train(pretrained, output, **options)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run that nothing happens to, by step."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run_ranks(2, train, llama, output)
    return recorded(output.with_suffix(".losses"))


def checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("*") if not path.name.startswith(".")]


def newest_step(output: Path) -> int:
    """Of the newest checkpoint, after all that are to be seen were verified; 0 where there is none."""
    for path in checkpoints(output):
        checkpoint = TrainingCheckpoint(path)
        checkpoint.verify(ShardGroup.single())
        checkpoint.close()
    newest = newest_checkpoint(output)
    return 0 if newest is None else TrainingCheckpoint(newest).manifest["step"]


# -- kill -9 ----------------------------------------------------------------------------------------------------------


LINKED = {"save_last": "link"}


def train_and_die(pretrained: Path, output: Path, call: int, victims: list[int], trigger: int) -> dict[str, Any]:
    kill_at(call, victims, trigger)
    return train(pretrained, output, callback=LINKED)


@pytest.mark.parametrize(
    ("victims", "trigger", "kills"),
    [
        pytest.param([0], 0, 8, id="writer"),
        pytest.param([1], 1, 6, id="other", marks=pytest.mark.matrix),
        pytest.param([0, 1], 0, 6, id="all"),
    ],
)
def test_kills_while_saving(
    llama: Path, tmp_path: Path, undisturbed: dict[int, float], victims: list[int], trigger: int, kills: int
) -> None:
    """One run, killed again and again: each goes on from the newest checkpoint, which never is an older one."""
    draw = random.Random(f"{victims}")
    output, reached = tmp_path / "out", 0
    for _ in range(kills):
        call = draw.randrange(230 if trigger == 0 else 150)  # within some two saves
        outcomes = run_ranks_catching(2, train_and_die, llama, output, call, victims, trigger)
        if all(error is None for _, error in outcomes):
            break  # there were fewer operations left
        assert all(error is not None for _, error in outcomes)
        assert newest_step(output) >= reached
        reached = newest_step(output)
        assert all(path.exists() for path in output.glob("last"))  # the link leads to a whole one
    else:
        assert reached > 0
    result = {"begun": reached}
    if reached < STEPS:
        result = run_ranks(2, train_with, llama, output, {"callback": LINKED})[0]
        assert sorted(path.name for path in output.iterdir()) == ["last", f"step={STEPS}"]
    assert result["begun"] == reached
    assert newest_step(output) == STEPS
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert recorded(output.with_suffix(".losses")) == undisturbed


@pytest.mark.parametrize("where", ["step", "write", "wait"])
def test_nobody_waits_for_a_dead_rank(llama: Path, tmp_path: Path, where: str) -> None:
    """Whether it died in the middle of a step, or in a background write, or in one that rank 0 waits for."""
    output = tmp_path / "out"
    outcomes = run_ranks_catching(2, die, llama, output, where)
    assert "exit code -9" in str(outcomes[1][1])
    assert outcomes[0][1] is not None
    assert newest_step(output) == (4 if where == "step" else 2)


def die(pretrained: Path, output: Path, where: str) -> None:
    train(pretrained, output, steps=2)
    if where != "step":
        kill_at(20, [1], 1)
    train(pretrained, output, callback={"background": where == "write"}, die_in_step=5 if where == "step" else None)


def initialise_and_die(pretrained: Path, output: Path, call: int) -> None:
    kill_at(call, [0, 1], 0)
    train(pretrained, output, steps=4, strategy={"init_cache": output.with_name("cache")})


def test_a_run_killed_while_it_initialised_goes_on(llama: Path, tmp_path: Path) -> None:
    run_ranks(2, train_into_cache, llama, tmp_path / "whole" / "out")
    for call in (3, 25):
        outcomes = run_ranks_catching(2, initialise_and_die, llama, tmp_path / "out", call)
        assert all("exit code -9" in str(error) for _, error in outcomes)
    run_ranks(2, train_into_cache, llama, tmp_path / "out")
    assert recorded(tmp_path / "out.losses") == recorded(tmp_path / "whole" / "out.losses")
    assert newest_step(tmp_path / "out") == 4
    assert not list((tmp_path / "cache").glob(".*"))


def train_into_cache(pretrained: Path, output: Path) -> None:
    train(pretrained, output, steps=4, strategy={"init_cache": output.with_name("cache")})


# -- a full disk ------------------------------------------------------------------------------------------------------


@alone
def run_out_of_space(pretrained: Path, output: Path, how: str, callback: dict[str, Any]) -> dict[str, Any]:
    if how == "writes" and torch.distributed.get_rank() == 1:
        full_disk_at("step=4")
    if how == "check":
        little_room_at("step=4")
    return train(pretrained, output, steps=8, callback=callback)


TEXTS = {"writes": "No space left on device", "check": "0.00 GB are free there"}


@pytest.mark.parametrize(("how", "background"), [("writes", True), ("check", False)])
def test_a_full_disk_stops(llama: Path, tmp_path: Path, how: str, background: bool) -> None:
    """With one message on every rank; what was complete is intact, and trained on from."""
    output, callback = tmp_path / "out", {"background": background, "on_save_error": "stop"}
    outcomes = run_ranks_catching(2, run_out_of_space, llama, output, how, callback)
    assert all(TEXTS[how] in str(error) for _, error in outcomes), outcomes
    assert all("step=4" in str(error) for _, error in outcomes), outcomes
    assert [path.name for path in output.iterdir()] == ["step=2"]
    assert newest_step(output) == 2
    assert run_ranks(2, train, llama, output)[0]["begun"] == 2


@pytest.mark.parametrize(
    ("how", "background", "last"), [("writes", True, "link"), ("check", True, True), ("writes", False, None)]
)
def test_training_goes_on_beside_a_full_disk(
    llama: Path, tmp_path: Path, how: str, background: bool, last: bool | str | None
) -> None:
    """The checkpoint before is not removed in favour of the failed one, nor are loggers told of that."""
    output = tmp_path / "out"
    callback = {"background": background, "on_save_error": "continue", "save_last": last}
    result = run_ranks(2, run_out_of_space, llama, output, how, callback)[0]
    assert [name for name in result["told"] if not name.endswith("last")] == ["out/step=2", "out/step=6", "out/step=8"]
    assert sum(TEXTS[how] in text for text in result["said"]) == 1
    assert result["best"] == str(output / "step=8")
    assert sorted(path.name for path in output.iterdir()) == [*(["last"] if last else []), "step=8"]
    assert newest_step(output) == 8


# -- what dead runs left, and what a file says ------------------------------------------------------------------------


def test_superseded_checkpoints_are_swept_at_resume(llama: Path, tmp_path: Path) -> None:
    """Those of this callback, which a killed attempt had no time to remove; not what it did not write."""
    output = tmp_path / "out"
    run_ranks(2, train_with, llama, output, {"steps": 8, "callback": {"save_top_k": -1}})
    manifest = json.loads((output / "step=4" / MANIFEST).read_text())
    manifest.pop("saved_by")  # by `trainer.save_checkpoint`, or another program
    (output / "step=4" / MANIFEST).write_text(json.dumps(sealed(manifest)))
    (output / "last").symlink_to("step=6")
    (output / "notes").mkdir()
    run_ranks(2, train_with, llama, output, {"steps": 12, "callback": LINKED})
    assert sorted(path.name for path in output.iterdir()) == ["last", "notes", "step=12", "step=4"]
    assert os.readlink(output / "last") == "step=12"


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state, and make all digests fit: whoever can write the files can do that."""
    state, manifest = checkpoint / "state.json", json.loads((checkpoint / MANIFEST).read_text())
    value = json.loads(state.read_text())
    change(value)
    state.write_text(json.dumps(value))
    manifest["files"]["state.json"] = file_digest(state)
    (checkpoint / MANIFEST).write_text(json.dumps(sealed(manifest)))


def test_a_forged_state_removes_nothing_and_sets_nothing(llama: Path, tmp_path: Path) -> None:
    output, thesis = tmp_path / "out", tmp_path / "thesis"
    for directory in (thesis, output / "adapters"):
        directory.mkdir(parents=True)
        (directory / "chapter-1").touch()

    def other_paths(state: dict[str, Any]) -> None:
        text = json.dumps(state["callbacks"]).replace(f"{output}/step=2", f"{output}/adapters/../../thesis")
        state["callbacks"] = json.loads(text)
        assert "thesis" in text

    def other_names(state: dict[str, Any]) -> None:
        for counts in ("current", "total"):
            state["loops"]["fit_loop"]["epoch_progress"][counts]["reset"] = 1

    run_ranks(2, train_with, llama, output, {"steps": 2})
    forge(output / "step=2", other_paths)
    result = run_ranks(2, train_with, llama, output, {"steps": 4})[0]
    assert any("is no checkpoint in" in text for text in result["said"])
    assert (thesis / "chapter-1").exists()
    assert (output / "adapters" / "chapter-1").exists()
    assert sorted(path.name for path in checkpoints(output)) == ["adapters", "step=2", "step=4"]
    forge(output / "step=4", other_names)
    shutil.rmtree(output / "step=2")  # or the run would resume from this one
    for _, error in run_ranks_catching(2, train_with, llama, output, {"steps": 6}):
        assert "epoch_progress.total has no 'reset' here" in str(error)


def test_a_directory_of_something_else_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "step=2").mkdir(parents=True)
    (output / "step=2" / "chapter-1").touch()
    options = {"steps": 4, "callback": {"enable_version_counter": False}}
    for _, error in run_ranks_catching(2, train_with, llama, output, options):
        assert "was not written by lowrank_dist" in str(error)
    assert [path.name for path in output.rglob("*")] == ["step=2", "chapter-1"]


# -- two runs ---------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_leaves_the_first_alone(llama: Path, tmp_path: Path) -> None:
    """Before anything is read; what is being written is not swept. A name of a checkpoint can be taken as well."""
    output = tmp_path / "out"
    run_ranks(2, train_with, llama, output, {"steps": 2})
    lock = Lock(output / ".run.lock", "out")
    lock.attempt()
    (output / f".step=4.{RANDOM}.partial").mkdir()
    for _, error in run_ranks_catching(2, train, llama, output):
        assert f"another run is writing it (process {os.getpid()} on " in str(error)
        assert "two runs in one dirpath would remove each other's checkpoints" in str(error)
    assert sorted(os.listdir(output)) == [".run.lock", f".step=4.{RANDOM}.partial", "step=2"]
    lock.release()
    with exclusive(output / "step=4"):
        for _, error in run_ranks_catching(2, train, llama, output):
            assert "another run is writing it" in str(error)
    assert run_ranks(2, train, llama, output)[0]["best"] == str(output / f"step={STEPS}")
    assert os.listdir(output) == [f"step={STEPS}"]


def test_where_nothing_can_be_written(llama: Path, tmp_path: Path) -> None:
    """One line on every rank, at set-up."""
    (tmp_path / "file").touch()
    for _, error in run_ranks_catching(2, train, llama, tmp_path / "file" / "out"):
        assert "checkpoints cannot be written there ([Errno 20] Not a directory" in str(error)
    options = {"strategy": {"init_cache": tmp_path / "file" / "cache"}}
    for _, error in run_ranks_catching(2, train_with, llama, tmp_path / "out", options):
        assert f"InputError: init_cache='{tmp_path}/file/cache': nothing can be written there ([Errno" in str(error)
