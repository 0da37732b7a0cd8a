"""The benchmarks run: a dry run at tiny scale, without a word on time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.gpu.profiles import overlap
from benchmarks.gpu.trainers import SHORT

from helpers.command import ROOT, python


def dry_run(*program: str, output: Path) -> str:
    done = python(*program, "--tiny", "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    report = output.read_text()
    assert "dry run" in report
    return report


def tables_of(output: Path, *names: str, ways: Sequence[str] = ()) -> dict[str, str]:
    """Tables that are made for an accelerator, by their names; one run on the CPU."""
    options = [option for name in names for option in ("--table", name)]
    options += [option for way in ways for option in ("--way", way)]
    report = dry_run("-m", "benchmarks.gpu", *options, "--device", "cpu", output=output)
    assert "out of memory" not in report
    found = re.split(r"^## .*\(`(\w+)`\)$", report, flags=re.MULTILINE)[1:]
    assert found[::2] == list(names)
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.fixture(scope="module")
def of_an_accelerator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without what is compiled, which takes a minute on a CPU."""
    output = tmp_path_factory.mktemp("accelerator") / "gpu.md"
    return tables_of(output, "layers", "step", "initialisation", ways=[way for way in SHORT if way != "compiled"])


@pytest.mark.matrix
def test_a_dry_run_replaces_nothing_that_was_measured(tmp_path: Path) -> None:
    """The test's own copy of the project stands in for this one. The run is a whole job without training."""
    project = tmp_path / "project"
    for directory in ("benchmarks", "configs"):
        shutil.copytree(ROOT / directory, project / directory)
    before = {path: path.read_bytes() for path in (project / "benchmarks" / "results").iterdir()}
    only = ["--table", "whole", "--rounds", "1", "--skip", "train"]
    command = [sys.executable, "-m", "benchmarks.gpu", *only, "--device", "cpu", "--tiny"]
    done = subprocess.run(
        command,
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{project / 'benchmarks'}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.read_bytes() for path in (project / "benchmarks" / "results").iterdir()} == before
    report = (project / "runs" / "dry" / "gpu.md").read_text()
    assert report.startswith("# On an accelerator: a dry run\n")
    assert "measured" not in report.splitlines()[0]
    assert "| initialise |" in report
    assert not any(f"| {stage} |" in report for stage in ("train", "save", "convert"))
    assert "tokens/s |" not in report


@pytest.mark.matrix
def test_every_table_at_tiny_scale(tmp_path: Path) -> None:
    report = dry_run("benchmarks/bench_init.py", "--repeats", "1", output=tmp_path / "init.md")
    for table in ("peft", "svd", "layers", "limit", "reduction", "projection"):
        assert f"(`{table}`)\n\n" in report
    for row in (
        "PEFT `pissa_niter_4`",
        "ours, `PiSSA()`, NF4",
        "dask `svd_compressed`",
        "Heat `rsvd`",
        "LLaMA-3.1-405B",
    ):
        assert f"| {row}" in report


@pytest.mark.matrix
def test_quantized_starts_at_tiny_scale(tmp_path: Path) -> None:
    """QERA errs less in the outputs than the quantized weight alone; training gives two more columns."""
    options = ["--starts", "QLoRA", "QERA, exact", "--train", "1", "2"]
    report = dry_run("benchmarks/bench_quantized_starts.py", *options, output=tmp_path / "quantized_starts.md")
    rows = {cells[1].strip(): cells[2:-1] for line in report.splitlines() if len(cells := line.split("|")) > 3}
    assert rows[""][-2:] == [" after 1 steps (rate) ", " after 2 steps (rate) "]
    assert float(rows["QERA, exact"][1]) < float(rows["QLoRA"][1])
    assert all(float(cell.split()[0]) > 0 for label in ("QLoRA", "QERA, exact") for cell in rows[label][-2:])


@pytest.mark.matrix
def test_formats_at_tiny_scale(tmp_path: Path) -> None:
    """Eight bits err less than four, and NF4 less than MXFP4."""
    report = dry_run("benchmarks/bench_formats.py", output=tmp_path / "formats.md")
    alone = report.split("## ")[1]
    rows = {cells[1].strip(): cells[2:-1] for line in alone.splitlines() if len(cells := line.split("|")) > 3}
    assert float(rows["FP8(block_size=128)"][1]) < float(rows["NF4(block_size=64, double_quant=False)"][1])
    assert float(rows["NF4(block_size=64, double_quant=False)"][1]) < float(rows["MXFP4()"][1])
    assert float(rows["INT8(block_size=64)"][1]) < 1


@pytest.mark.matrix
def test_preparing_data_at_tiny_scale(tmp_path: Path) -> None:
    """Both projects prepare all records, the first time and again."""
    report = dry_run("benchmarks/bench_data.py", output=tmp_path / "data.md")
    rows = [line.split("|")[1].strip() for line in report.splitlines() if line.count("|") > 6]
    for project in ("this project", "TRL"):
        assert f"{project}, first time, 2 processes" in rows
        assert f"{project}, second time" in rows


@pytest.mark.matrix
def test_checkpoints_at_tiny_scale(tmp_path: Path) -> None:
    """Of the figures, those that are no times: what can be resumed elsewhere, and what holds pickles."""
    report = dry_run("benchmarks/bench_checkpoint.py", output=tmp_path / "checkpoint.md")
    for title in ("Saving", "Steps beside a save", "Starting"):
        assert f"## {title}\n\n" in report
    rows = {cells[1].strip(): cells[2:] for line in report.splitlines() if len(cells := line.split("|")) > 3}
    for label, resumes, pickles in (
        ("ours, in the background", "yes", "no"),
        ("ours, `background=False`", "yes", "no"),
        ("Lightning's, without frozen parameters", "no", "yes"),
        ("Lightning's, with frozen parameters", "no", "yes"),
    ):
        assert [cell.strip() for cell in rows[label][-3:-1]] == [resumes, pickles]
    assert {"fresh", "resumed", "nothing is written"} <= set(rows)
    assert "as many ranks: DeepSpeed loaded it" in report


@pytest.mark.matrix
def test_ways_of_training_on_the_cpu(of_an_accelerator: dict[str, str]) -> None:
    check_ways_of_training(of_an_accelerator["step"], 6)


@pytest.mark.matrix
def test_all_ways_of_training_on_the_cpu(tmp_path: Path) -> None:
    check_ways_of_training(tables_of(tmp_path / "gpu.md", "step")["step"], len(SHORT))


def check_ways_of_training(step: str, count: int) -> None:
    """They learn from the same model."""
    rows = {cells[1].strip(): cells[-2].split() for line in step.splitlines() if len(cells := line.split("|")) == 10}
    trained = {way: tuple(map(float, cells)) for way, cells in rows.items() if way.startswith(("ours", "PEFT"))}
    assert len(trained) == count
    dense = trained.pop("PEFT, dense")
    assert len({first for first, _ in trained.values()}) == 1  # of one quantized model
    assert all(last < first for first, last in [dense, *trained.values()])


def test_ways_of_computing_a_layer_on_the_cpu(of_an_accelerator: dict[str, str]) -> None:
    """fp32: all of them are right to rounding, gradients included."""
    layers = of_an_accelerator["layers"]
    rows = [line.split("|") for line in layers.splitlines() if line.startswith("| tiny up_proj")]
    assert len(rows) == 7
    errors = [cell.strip() for row in rows for cell in row[-3:-1]]
    assert all(float(error) < 1e-6 for error in errors if error != "-")


def test_what_a_profile_says_is_hidden() -> None:
    """Stream 7 computes for 8 s; the others copy for 4.5 s together, 2.5 s of them meanwhile."""
    streams = {7: [(0, 4), (3, 5), (6, 9)], 20: [(1, 2), (1.5, 3), (5, 6)], 21: [(8.5, 10)], 22: [(5.25, 5.5)]}
    assert overlap(streams) == (4.5, 2.5)
    assert overlap({}) == (0, 0)


def test_initialisation_on_the_cpu(of_an_accelerator: dict[str, str]) -> None:
    """Every shape of a layer, three ways; ours leaves no more than the best residual, which the spectrum gives."""
    report = of_an_accelerator["initialisation"]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| tiny")
    ]
    excess = {(row[1], row[3]): row[9] for row in rows}
    shapes = {shape for shape, _ in excess}
    assert shapes == {"64 x 64", "32 x 64", "160 x 64", "64 x 160"}
    for shape in shapes:
        assert excess[shape, "QPiSSA, T = 5"] == "-"
        ours, peer = (float(excess[shape, way]) for way in ("QPiSSA, T = 1", "PEFT `pissa_niter_16`"))
        assert abs(ours) < 1e-6  # fp32 rounding of norms
        assert -1e-6 < peer < 1e-2
    for way in ("QPiSSA, T = 1", "QPiSSA, T = 5", "PEFT `pissa_niter_16`"):
        line = re.search(rf"- tiny, {way}: 3 x \((.*)\) = ([\d.]+) s", report)
        assert line is not None
        terms = [term.split(" x ") for term in line[1].split(" + ")]
        assert [int(count) for count, _ in terms] == [2, 2, 2, 1]
        assert float(line[2]) == pytest.approx(3 * sum(int(n) * float(each) for n, each in terms), abs=0.06)


@pytest.mark.matrix
def test_a_whole_job_on_the_cpu(tmp_path: Path) -> None:
    """Every stage runs, more rounds save more of the quantization error, and what is trained learns."""
    report = tables_of(tmp_path / "gpu.md", "whole")["whole"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    stages = [row[0] for row in rows if row[0] in ("initialise", "train", "save", "convert")]
    assert stages == 2 * ["initialise", "train", "save", "convert"]
    reductions = [float(found) for found in re.findall(r"\(Frobenius\): ([\d.]+)%", report)]
    assert 0 < reductions[0] < reductions[1]
    losses = [tuple(map(float, row[-1].split())) for row in rows if len(row) == 8 and row[0].replace(".", "").isdigit()]
    assert len(losses) == 2
    assert all(last < first for first, last in losses)


@pytest.mark.matrix
def test_the_host_at_tiny_scale(tmp_path: Path) -> None:
    """Of the figures, those that are no times: one collective brings a layer."""
    report = dry_run("benchmarks/bench_host.py", output=tmp_path / "host.md")
    for row in ("PEFT, dense", "PEFT + bitsandbytes", "ours", "ours, folded", "ours, 2 ranks"):
        assert f"\n| {row} | " in report
    (gathers,) = re.findall(r"^\| all_gather_into_tensor \| (\d+) ", report, flags=re.MULTILINE)
    assert int(gathers) == 2 * 2 + 2 + 2  # of two layers, the norm, the embedding and the head


@pytest.mark.matrix
def test_tuners_at_tiny_scale(tmp_path: Path) -> None:
    report = dry_run("benchmarks/bench_tuners.py", output=tmp_path / "tuners.md")
    for tuner in ("LoRA", "VeRA", "IA3", "OFT", "LoHa"):
        (row,) = re.findall(rf"^\| {tuner} \| (.*) \|$", report, flags=re.MULTILINE)
        assert len(row.split(" | ")) == 4
        assert (row.split(" | ")[2] == "- / -") == (tuner == "LoHa")  # PEFT has no LoHa over bitsandbytes
        assert f"- {tuner}: a layer takes " in report


def test_dora_at_tiny_scale(tmp_path: Path) -> None:
    report = dry_run("benchmarks/bench_dora.py", output=tmp_path / "dora.md")
    for way in ("LoRA, ours", "DoRA, ours", "DoRA, PEFT's layer on ours", "DoRA, PEFT + bitsandbytes"):
        assert f"| {way} |" in report


def test_experts_at_tiny_scale(tmp_path: Path) -> None:
    report = dry_run("benchmarks/bench_experts.py", output=tmp_path / "experts.md")
    for way in ("PEFT, dense weights", "NF4, all experts dense at once (before)", "NF4, 2 at a time"):
        assert f"| {way} |" in report


@pytest.mark.matrix
def test_a_step_at_tiny_scale(tmp_path: Path) -> None:
    """Every way trains the same model: the losses agree, but for those of dense weights."""
    report = dry_run("benchmarks/bench_step.py", output=tmp_path / "step.md")
    rows = [line.split("|") for line in report.splitlines() if line.startswith(("| PEFT", "| ours"))]
    assert [row[1].strip() for row in rows] == ["PEFT, dense", "PEFT + bitsandbytes", "ours", "ours, 2 ranks"]
    losses = [float(row[-2].split()[0]) for row in rows]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_start_up_at_tiny_scale(tmp_path: Path) -> None:
    report = dry_run("benchmarks/bench_startup.py", output=tmp_path / "startup.md")
    for start in ("`import lowrank_dist`", "`lowrank-dist --help`", "`lowrank-dist inspect`, a small model"):
        assert f"\n| {start} | " in report
