"""``lowrank-dist evaluate``: what is refused before a model is loaded, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_dist.cli import evaluate, main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "z.json", "--samples", "z.json"], "--samples z.json is --output too"),
        (["--output", "/proc/x/z.json"], "nothing can be written in /proc"),
        (["--data", "gsm8k=a", "--data", "gsm8k=b"], "--data gsm8k: given more than once; pass one file for it"),
        (["--overwrite"], "--overwrite has no effect without --output or --samples"),
    ],
)
@pytest.mark.parametrize("devices", ["1", "2"])
def test_outputs_are_checked_before_anything_is_read(
    options: list[str], message: str, devices: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "/no/such/model", "--tasks", "gsm8k", "--devices", devices, *options]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_of_zero_are_recorded(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "z.json"
    given = ["model", "--tasks", "gsm8k", "--seed", "0", "--num_fewshot", "0", "--output", str(output)]
    scores: Any = {"trained": SimpleNamespace(results={}, samples={})}
    evaluate.write_results(evaluate.parser().parse_args(given), scores, {"trained": "checkpoint"})
    recorded = json.loads(output.read_text())["options"]
    assert (recorded["seed"], recorded["num_fewshot"]) == (0, 0)
    assert {"system_instruction", "apply_chat_template", "data"}.isdisjoint(recorded)
