"""``lowrank-dist decompose`` and ``report`` as a user runs them, ranks and all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.command import lowrank_dist
from lowrank_dist.cli import main
from lowrank_dist.cli.decompose import QUANTIZED
from lowrank_dist.methods import METHODS
from lowrank_dist.quantization import FP4, FP8, INT8, MXFP4, Dense
from lowrank_dist.residual_model.reader import ResidualModel


def test_decompose_with_two_ranks_then_report(llama: Path, tmp_path: Path) -> None:
    options = ["--pretrained", llama, "--output", tmp_path / "out", "--rank", "4", "--devices", "2"]
    options += ["--method", "qpissa", "--init.quantization_iterations", "2", "--nf4.double_quant", "true", "--thorough"]
    command = [sys.executable, "-m", "lowrank_dist.cli", "decompose", *map(str, options)]  # which starts the ranks
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "Gflop/s a rank" in done.stderr + done.stdout
    assert str(tmp_path / "out") in done.stdout
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    PeftModel.from_pretrained(stock, tmp_path / "out" / "pissa_init")

    picture, figures = tmp_path / "p.png", tmp_path / "f.json"
    done = lowrank_dist("report", tmp_path / "out", "--picture", picture, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    entries = json.loads(figures.read_text())["matrices"]
    assert len(entries) == 14
    for entry in entries:
        assert 0 < entry["error"] < entry["quantization_error"] < entry["norm"]
        assert entry["nuclear_reduction"] == pytest.approx(entry["error_reduction"], abs=0.1)
        assert len(entry["singular_values"]) == entry["rank"] == 4
        assert entry["sigma_1"] >= entry["sigma_r"] == entry["singular_values"][-1]
        assert entry["ended_on"] in ("quantize", "decompose")
    known = [entry["excess_residual"] for entry in entries if entry["excess_residual"] is not None]
    assert known
    assert all(0 <= value < 0.1 for value in known)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "nonsense"], "there is no initialisation 'nonsense'; registered are"),
        (["--method", "corda"], "--method corda needs data; pass --calibration_data"),
        (["--calibration_data", "x.jsonl"], "PiSSA uses no data; leave it out"),
        (["--method", "qpissa", "--quantization", "none"], "--method qpissa requires a quantized residual"),
        (["--method", "loftq", "--quantization", "none"], "LoftQ corrects a quantization error"),
        (["--method", "qpissa", "--fp8.block_size", "64"], "--fp8.block_size has no effect on --quantization nf4"),
        (["--quantization", "int8", "--int8.block_size", "100"], "INT8: block_size=100 is not one of"),
        (["--init.power_iterations", "-1"], "power_iterations=-1 must not be negative"),
        (["--rank", "65"], "rank=65 exceeds min(out, in)"),
        (["--ranks_per_matrix", "2"], "ranks_per_matrix=2 does not divide the 1 ranks"),
        (["--pretrained", "/nowhere"], "pretrained='/nowhere': no such directory"),
        (["--adapter", "/nowhere"], "--adapter /nowhere: no such file"),
        (["--revision", "main"], "which has no revisions such as 'main'"),
        (["--rank", "0"], "--rank 0 must be positive"),
        (["--alpha", "0"], "--alpha 0.0 must be positive"),
        (["--devices", "0"], "--devices 0 must be positive"),
        (["--ranks_per_matrix", "-1"], "--ranks_per_matrix -1 must be positive"),
        (["--adapter", "a.json", "--rank", "16"], "--rank has no effect with --adapter a.json, which says it"),
        (["--adapter", "a.json", "--alpha", "3"], "--alpha has no effect with --adapter a.json"),
        (["--adapter", "a.json", "--rslora"], "--rslora has no effect with --adapter a.json"),
        (["--adapter", "a.json", "--target_modules", "q_proj"], "--target_modules has no effect with --adapter a.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_end_in_one_message(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    base = ["--output", str(tmp_path / "out")]
    base += [] if "--pretrained" in options else ["--pretrained", str(llama)]
    base += [] if {"--rank", "--adapter"} & {*options} else ["--rank", "4"]
    assert main(["decompose", *base, *options]) == 1
    error = capsys.readouterr().err
    assert error.count("lowrank-dist decompose: ") == 1
    assert text in error
    assert not (tmp_path / "out").exists()


def test_a_residual_model_is_not_decomposed_again(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    residual = str(tmp_path / "residual")
    assert main(["decompose", "--pretrained", str(llama), "--output", residual, "--rank", "4"]) == 0
    assert main(["decompose", "--pretrained", residual, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"--pretrained {residual}: is a residual model" in error
    assert f"pass the original model, {llama}, or train it as it is" in error
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing(tmp_path: Path) -> None:
    done = lowrank_dist("report", tmp_path)
    assert done.returncode == 1
    assert "holds no lowrank_dist.json; pass a residual model" in done.stderr


@pytest.mark.parametrize("method", sorted({*METHODS, *QUANTIZED} - {"corda", "eva", "lora_ga", "lora_one", "qera"}))
def test_every_method_without_calibration_decomposes(method: str, llama: Path, tmp_path: Path) -> None:
    """Those without settings of their own too."""
    arguments = ["--pretrained", str(llama), "--output", str(tmp_path / "out"), "--rank", "4", "--method", method]
    assert main(["decompose", *arguments]) == 0
    assert ResidualModel(tmp_path / "out", Dense(dtype=torch.float32)).adapter.r == 4


def test_formats_of_the_residual(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their names and options on the command line; `report` and `inspect` say them."""
    for name, options, expected in (
        ("fp4", ["--fp4.double_quant", "true"], FP4(double_quant=True)),
        ("int8", [], INT8()),
        ("fp8", ["--fp8.block_size", "64"], FP8(block_size=64)),
        ("mxfp4", [], MXFP4()),
    ):
        output = tmp_path / name
        arguments = ["--pretrained", str(llama), "--output", str(output), "--rank", "4", "--method", "qpissa"]
        assert main(["decompose", *arguments, "--quantization", name, *options]) == 0
        said = capsys.readouterr().out
        assert (f"{expected}: this package loads the residual" in said) == (name != "fp4")
        assert ResidualModel(output, Dense(dtype=torch.float32)).residual == expected
        entries = json.loads((output / "lowrank_dist.json").read_text())["matrices"]
        assert all(0 < entry["error"] < entry["quantization_error"] for entry in entries)
        assert main(["inspect", str(output)]) == 0
        assert str(expected) in capsys.readouterr().out
