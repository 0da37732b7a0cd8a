"""The points of a sweep: a directory for each, whatever they are called, and no value that is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.slurm import SubmitError, SubmitOptions, prepare
from lowrank_dist.slurm.sweep import file_names
from lowrank_dist.training.fit_cli import parse_fit

CONFIG = str(Path(__file__).parents[3] / "configs" / "llama3-70b_qpissa_32gpu.yaml")
# jsonargparse fills every option of the configuration in, and peft warns of this one
pytestmark = pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")

LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs", "name": "a"}}
HISTORY = {"class_path": "lowrank_dist.LossHistory", "init_args": {"path": "/shared/history.json"}}
SAVES = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {}}


def options(root: Path, *sweep: str, **others: Any) -> SubmitOptions:
    overrides = (f"--trainer.default_root_dir={root}", *others.pop("overrides", ()))
    return SubmitOptions(config=(CONFIG,), sweep=sweep, overrides=overrides, **others)


def test_files_of_the_same_name_are_different_points(tmp_path: Path) -> None:
    files = []
    for name, lr in (("a", 1e-4), ("b", 5e-4)):
        files.append(tmp_path / name / "x.yaml")
        files[-1].parent.mkdir()
        files[-1].write_text(json.dumps({"model": {"lr": lr}}))
    found = prepare(options(tmp_path, f"config={files[0]},{files[1]}"))
    assert found.roots == (tmp_path / "config=a-x", tmp_path / "config=b-x")


@given(st.lists(st.from_regex(r"(/(a|b|a-b)){1,3}(\.yaml|\.yml)", fullmatch=True), min_size=1, max_size=5, unique=True))
def test_names_of_files_differ(files: list[str]) -> None:
    """Whatever the files are called, as long as a dash does not stand for two directories alike."""
    names = file_names(files)
    assert set(names) == set(files)
    if len({file.replace("/", "-") for file in files}) == len(files):
        assert len(set(names.values())) == len(files)
    assert all("/" not in name for name in names.values())


def test_the_stem_is_enough_where_stems_differ() -> None:
    assert file_names(["m/qpissa.yaml", "m/qlora.yaml"]) == {"m/qpissa.yaml": "qpissa", "m/qlora.yaml": "qlora"}
    assert list(file_names(["m/x.yaml", "m/x.yml"]).values()) == ["x.yaml", "x.yml"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["lr=1e-4,1e-4"], "the points lr=1e-4 and lr=1e-4 would share the directory .*/lr=1e-4"),
        (["config={0},{0}"], "would share the directory"),
        (["trainer.devices=8,4"], "devices=4 needs 4 nodes of 4 GPU ranks, and devices=8 4 nodes of 8 GPU ranks"),
    ],
)
def test_points_that_are_one_are_refused(sweep: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("{}")
    with pytest.raises(SubmitError, match=message):
        prepare(options(tmp_path, *(axis.format(file) for axis in sweep)))


@pytest.mark.parametrize(
    ("sweep", "overrides", "message"),
    [
        (["lr=1e-4", "lr=1e-5"], [], "--sweep lr=1e-5: it would replace what --sweep lr=1e-4 sets"),
        (["lr=1e-4", "model.lr=1e-5"], [], "--sweep model.lr=1e-5: it would replace"),
        (["model.lr=1e-4", "lr=1e-5"], [], "--sweep lr=1e-5: it would replace"),
        (["rank=4,8", "trainer.strategy.adapter.lora_alpha=1"], [], "it would replace what --sweep rank=4,8 sets"),
        (["rank=4", "trainer.strategy.init_args.adapter=a"], [], "it would replace what --sweep rank=4 sets"),
        (["lr=1e-4"], ["--model.lr=1e-3"], "it would replace what --model.lr sets"),
        (["lr=1e-4"], ["--model.lr", "1e-3"], "it would replace what --model.lr sets"),
        (["trainer.default_root_dir=a,b"], [], "every point has a directory of its own below it; leave it out"),
        (["ckpt_path=a,b"], [], "every point resumes from its own newest checkpoint"),
    ],
)
def test_a_key_is_given_once(sweep: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(SubmitError, match=message):
        SubmitOptions(config=("x",), sweep=tuple(sweep), overrides=tuple(overrides))


def test_a_class_and_then_its_arguments_are_given() -> None:
    SubmitOptions(config=("x",), sweep=("trainer.strategy.adapter=peft.LoraConfig", "rank=4,8"))


def test_every_point_keeps_its_own_batches(tmp_path: Path) -> None:
    found = prepare(options(tmp_path, "trainer.accumulate_grad_batches=1,2"))
    assert [job.batches for job in found.jobs] == [32, 64]


def test_loggers_of_a_list_write_to_the_points_directory(tmp_path: Path) -> None:
    loggers = json.dumps([LOGGER, {**LOGGER, "init_args": {**LOGGER["init_args"], "name": "b"}}])
    found = prepare(options(tmp_path, "lr=1e-4,1e-5", overrides=[f"--trainer.logger={loggers}"]))
    for job, root in zip(found.jobs, found.roots, strict=True):
        parsed = parse_fit([*(f"--config={path}" for path in job.config), *job.overrides]).trainer.logger
        assert [(part.init_args.save_dir, part.init_args.name) for part in parsed] == [
            (str(root), "a"),
            (str(root), "b"),
        ]


def test_a_file_that_all_points_would_write_is_refused(tmp_path: Path) -> None:
    overrides = [f"--trainer.callbacks={json.dumps([HISTORY, SAVES])}"]
    with pytest.raises(SubmitError, match=r"every point would write to LossHistory.path=/shared/history.json"):
        prepare(options(tmp_path, "lr=1e-4,1e-5", overrides=overrides))


def test_two_callbacks_of_one_run_may_share_a_directory(tmp_path: Path) -> None:
    saves = {**SAVES, "init_args": {"dirpath": str(tmp_path / "checkpoints")}}
    prepare(options(tmp_path, overrides=[f"--trainer.callbacks={json.dumps([saves, saves])}"]))
