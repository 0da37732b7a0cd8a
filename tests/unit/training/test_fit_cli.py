"""The module of a Trainer command: `CausalLMModule`, or the one that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_dist import CausalLMModule, PreferenceModule
from lowrank_dist.training.fit_cli import instantiated, module_settings, names_module, parse_fit

DATA = ["--data.tokenizer=t", "--data.train=u"]


@pytest.mark.parametrize(
    ("text", "arguments", "named"),
    [
        ("model: {pretrained: x}", [], False),
        ("model: {class_path: lowrank_dist.PreferenceModule, init_args: {pretrained: x}}", [], True),
        ("model: lowrank_dist.PreferenceModule", [], True),
        ("trainer: {max_steps: 1}", ["--model=lowrank_dist.PreferenceModule"], True),
        ("trainer: {max_steps: 1}", ["--model.class_path", "lowrank_dist.PreferenceModule"], True),
        ("- a list", ["--model.pretrained=x"], False),
        ("{", [], False),
    ],
)
def test_whether_the_module_is_named(text: str, arguments: list[str], named: bool, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for config in ([f"--config={tmp_path / 'c.yaml'}"], ["--config", str(tmp_path / "c.yaml")]):
        assert names_module([*config, *arguments]) is named
    assert names_module(["--config=missing.yaml", *arguments]) is (named and bool(arguments))


def test_parts_of_a_configuration_go_together(tmp_path: Path) -> None:
    """One without a class, one that names it, and the command line."""
    (tmp_path / "base.yaml").write_text("model: {pretrained: x, lr: 1.0e-3, warmup_ratio: 0.1}")
    (tmp_path / "named.yaml").write_text("model: {class_path: lowrank_dist.PreferenceModule, init_args: {beta: 0.2}}")
    files = [f"--config={tmp_path / name}.yaml" for name in ("base", "named")]
    settings = parse_fit([*files, "--model.lr=2e-3", *DATA])
    model = module_settings(settings)
    assert (model.pretrained, model.lr, model.warmup_ratio, model.beta) == ("x", 2e-3, 0.1, 0.2)
    made = instantiated(settings, "model")
    assert type(made) is PreferenceModule
    assert made.lr == 2e-3
    plain = parse_fit([files[0], *DATA])
    assert module_settings(plain).lr == 1e-3
    assert type(instantiated(plain, "model")) is CausalLMModule
