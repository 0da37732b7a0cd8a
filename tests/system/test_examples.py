"""Every program of ``examples/`` on two CPU ranks, in the order in which the later ones need the earlier."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.command import ROOT, run_main
from helpers.ranks import environment_of, meeting_place

EXAMPLES = ROOT / "examples"
#: Those of the second list run in `make test-matrix` only.
QUICK = ["classify", "chat", "preference"]
OTHERS = ["plain_module", "pretrain", "experts", "own_method", "own_source", "sweep"]


def start(argv: list[str]) -> int:
    """Run a program in a directory; a process of its own, since one registers a method."""
    program, directory = argv
    os.chdir(directory)
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
    return 0


def run(name: str, directory: Path, ranks: int = 2, **environment: str) -> CompletedProcess[str]:
    store = meeting_place()
    places = [environment_of(rank, ranks, store.port) | environment for rank in range(ranks)]
    found = run_main(start, [str(EXAMPLES / f"{name}.py"), str(directory)], places)
    for one in found:
        assert one.returncode == 0, f"{name}.py\n{one.stderr[-3000:]}"
    return found[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("examples")
    (done,) = run_main(start, [str(EXAMPLES / "tiny.py"), str(place)], [{}])
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.matrix) for name in OTHERS)])
def test_an_example_runs(name: str, directory: Path) -> None:
    done = run(name, directory)
    written = directory / "runs" / "examples" / name
    if name == "classify":
        base = AutoModelForSequenceClassification.from_pretrained(directory / "runs" / "examples" / "bert")
        PeftModel.from_pretrained(base, written / "step=4" / "lora")
    elif name in ("chat", "experts", "preference"):
        base = AutoModelForCausalLM.from_pretrained(
            directory / "runs" / "examples" / ("mixtral" if name == "experts" else "llama")
        )
        PeftModel.from_pretrained(base, next(written.iterdir()) / "lora")
    elif name == "sweep":
        losses = [float(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if line.startswith("rank ")]
        assert len(losses) == 2
        assert losses == sorted(losses)
    if name == "chat":  # which leaves what this one needs
        served = run("serve", directory, ranks=1)
        assert served.stdout.splitlines()[-1].startswith("vllm serve")


def test_a_run_goes_on_with_one_rank(directory: Path) -> None:
    assert "trained to step 2" in run("resume", directory, STOP_AT="2").stdout
    done = run("resume", directory, ranks=1, DEVICES="1")
    assert "trained to step 4" in done.stdout
    steps = {path.name for path in (directory / "runs" / "examples" / "resume").iterdir() if path.is_dir()}
    assert steps == {f"step={step}" for step in range(1, 5)}


def run_cells(argv: list[str]) -> int:
    """Run the code of a notebook, cell by cell, as a kernel does."""
    notebook, directory = argv
    os.chdir(directory)
    cells: list[dict[str, Any]] = json.loads(Path(notebook).read_text())["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}, {cell['id']}", "exec"), names)
    return 0


def test_the_notebook(directory: Path) -> None:
    (done,) = run_main(run_cells, [str(EXAMPLES / "step_by_step.ipynb"), str(directory)], [{}])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the error of NF4 removed") == 3
    cells = json.loads((EXAMPLES / "step_by_step.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_every_example_is_run_and_has_its_page() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*QUICK, *OTHERS, "tiny", "serve", "resume"}
    page = (ROOT / "docs" / "guides" / "examples.md").read_text()
    assert all(f"examples/{name}.py" in page for name in found)
