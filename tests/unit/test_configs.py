"""Every file of configs/ is what its name says, and the parser of ``lowrank-dist fit`` takes it."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser, capture_parser
from lightning.pytorch.strategies import DDPStrategy

from lowrank_dist import NF4, LoftQ, LoRA, PiSSA, PiSSAStrategy
from lowrank_dist.trainer_cli import run_trainer

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NAME = re.compile(r"(?P<model>[a-z0-9.-]+)_(?P<method>[a-z]+)_(?P<count>\d+)(?P<kind>cpu|gpu)")
METHODS = {"lora": LoRA, "qlora": LoRA, "pissa": PiSSA, "qpissa": PiSSA, "loftq": LoftQ}
QUANTIZED = {"qlora", "qpissa", "loftq"}

# jsonargparse fills every option of the configuration in, and peft warns of this one
pytestmark = pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@cache
def parser() -> ArgumentParser:
    """The parser of LightningCLI as `run_trainer` builds it, before it parses."""
    with patch.object(sys, "argv", ["lowrank-dist", "fit"]):
        return capture_parser(run_trainer, ["fit"])


def parse(path: Path) -> Any:
    return parser().parse_args(["fit", f"--config={path}"]).fit


def instantiate(settings: Any, part: str) -> Any:
    """The object that `part` of parsed settings stands for; for the trainer, its options."""
    fit = parser()._subcommands_action.choices["fit"]
    return getattr(fit, "instantiate", fit.instantiate_classes)(settings)[part]


def parts_of(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.stem)
    assert match is not None, f"{path.name} is not <model>_<method>_<devices>.yaml"
    return match.groupdict()


def test_the_six_runs_of_the_demo_model_are_there() -> None:
    methods = {parts_of(path)["method"] for path in FILES if path.stem.startswith("smollm2-135m_")}
    assert methods == {"full", *METHODS}


@each_file
def test_a_file_is_what_its_name_says(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    parts, settings = parts_of(path), parse(path)
    trainer = settings.trainer
    assert trainer.accelerator == parts["kind"]
    assert trainer.devices * trainer.num_nodes == int(parts["count"])
    assert trainer.default_root_dir == trainer.logger.init_args.save_dir == f"runs/{path.stem}"
    strategy = instantiate(settings, "trainer").strategy
    if parts["method"] == "full":
        assert type(strategy) is DDPStrategy
        return
    assert type(strategy) is PiSSAStrategy
    assert type(strategy.init) is METHODS[parts["method"]]
    assert isinstance(strategy.quantization, NF4 if parts["method"] in QUANTIZED else type(None))
    assert strategy.pretrained == settings.model.pretrained == settings.data.tokenizer
    assert strategy.adapter.r == strategy.adapter.lora_alpha


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("cpu")], ids=lambda path: path.stem)
def test_cpu_runs_can_be_instantiated(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse(path)
    options = instantiate(settings, "trainer")
    trainer = L.Trainer(**vars(options))
    assert trainer.world_size == 2
    assert isinstance(instantiate(settings, "model"), L.LightningModule)
    assert isinstance(instantiate(settings, "data"), L.LightningDataModule)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_file_serves_all_commands(command: str) -> None:
    (path,) = (path for path in FILES if path.stem == "smollm2-135m_qpissa_2cpu")
    settings = parser().parse_args([command, f"--config={path}"])[command]
    assert settings.model == parse(path).model


def test_the_runs_of_one_model_differ_in_the_method_only() -> None:
    """Same model, data, steps, batch: they differ in strategy, callbacks, rate, and where results go."""
    parsed = {path.stem: yaml.safe_load(path.read_text()) for path in FILES if path.stem.startswith("smollm2-135m_")}
    for settings in parsed.values():
        trainer = settings["trainer"]
        for key in ("strategy", "callbacks", "logger", "default_root_dir"):
            del trainer[key]
        assert settings["model"].pop("lr") in (2e-5, 3e-4, 3e-3)
    full = parsed.pop("smollm2-135m_full_2cpu")
    assert full["trainer"].pop("precision") == "bf16-mixed"
    (first, *others) = parsed.values()
    assert all(other == first for other in others)
    assert first["trainer"].pop("precision") == "bf16-true"
    assert full == first


UNKNOWN = {
    "trainer": ("trainer",),
    "model": ("model",),
    "data": ("data",),
    "strategy": ("trainer", "strategy", "init_args"),
    "adapter": ("trainer", "strategy", "init_args", "adapter", "init_args"),
    "init": ("trainer", "strategy", "init_args", "init", "init_args"),
    "quantization": ("trainer", "strategy", "init_args", "quantization", "init_args"),
    "callback": ("trainer", "callbacks", 0, "init_args"),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_unknown_keys_are_refused(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = (path for path in FILES if path.stem == "smollm2-135m_qpissa_2cpu")
    settings = yaml.safe_load(source.read_text())
    target = settings
    for key in UNKNOWN[place]:
        target = target[key]
    target["no_such_key"] = 1
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stopped:
        parse(changed)
    assert stopped.value.code == 2
    assert "no_such_key" in capsys.readouterr().err
