"""Runs of PEFT's tuners on two ranks, and what the commands say of their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.tuners import train_tuned
from lowrank_dist import NF4
from lowrank_dist.cli import main
from lowrank_dist.storage.inspect import inspect
from lowrank_dist.storage.reader import CheckpointReader

# PEFT warns of rounding in merges
pytestmark = pytest.mark.filterwarnings("ignore")


def train(pretrained: Path, name: str, options: dict[str, Any]) -> list[float]:
    return train_tuned(pretrained, name, **options)


@pytest.fixture(scope="module")
def vera(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of VeRA and all norms, beside a base in NF4."""
    save = tmp_path_factory.mktemp("vera") / "step=2"
    options = {"steps": 2, "save": save, "quantization": NF4(), "train_also": ["*norm*"]}
    run_ranks(2, train, llama, "vera", options)
    return save


def base_of(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_merge(llama: Path, vera: Path, tmp_path: Path) -> None:
    """Into the original weights, not into those that NF4 made of them."""
    assert main(["merge", str(vera), "--output", str(tmp_path / "merged")]) == 0
    stock: Any = PeftModel.from_pretrained(base_of(llama), vera / "adapter").merge_and_unload()
    expected, found = stock.state_dict(), base_of(tmp_path / "merged").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    before = base_of(llama).state_dict()
    assert sum(not torch.equal(before[name], weight) for name, weight in found.items()) == 14 + 5


def test_convert(llama: Path, vera: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The update of VeRA has rank 8; the norms go along."""
    command = ["convert", str(vera), "--output", str(tmp_path / "lora")]
    assert main(command) == 1
    assert "its adapter is of type VERA and has no exact LoRA" in capsys.readouterr().err
    assert main([*command, "--rank", "8"]) == 0
    assert "Rank 8 of 64 keeps all of the update's energy" in capsys.readouterr().out
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        there, here, plain = (
            model.eval()(input_ids=ids).logits
            for model in (
                PeftModel.from_pretrained(base_of(llama), vera / "adapter"),
                PeftModel.from_pretrained(base_of(llama), tmp_path / "lora"),
                base_of(llama),
            )
        )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert (there - plain).abs().max() > 1e-3


def test_inspect_and_report(vera: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(vera)
    assert found.problems == []
    assert (found.facts["type"], found.facts["rank"], found.facts["step"]) == ("VERA", 8, 2)
    assert found.facts["training can resume"] is True
    stored = CheckpointReader(vera / "adapter", stem="adapter_model")
    assert found.facts["trained parameters"] == sum(torch.Size(stored.info(name).shape).numel() for name in stored)
    assert main(["report", str(vera)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 7
    assert all(line.split()[5] == "-" for line in lines[1:])  # no rank


def test_a_run_that_encodes_nothing(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Virtual tokens before a dense model; `InitReport` says so too."""
    save = tmp_path / "step=1"
    options = {"steps": 1, "save": save, "quantization": None, "encode": "adapted"}
    run_ranks(1, train, llama, "prompt_tuning", options)
    assert inspect(save).problems == []
    for command in (
        ["merge", str(save), "--output", "x"],
        ["convert", str(save), "--output", "x"],
        ["report", str(save)],
    ):
        assert main(command) == 1
    error = capsys.readouterr().err
    for text in ("type PROMPT_TUNING cannot be merged", "virtual tokens are in no weight", "decomposed no matrix"):
        assert text in error
