"""``lowrank-dist report``: of runs whose adapters are not made from the weights, and as a page."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from lowrank_dist.cli import main
from lowrank_dist.decomposition.report import MatrixReport, as_table


def test_matrices_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their error is that of the format: there is no rank, and nothing was reduced."""
    only = MatrixReport(name="layers.0.q_proj", rows=6, columns=4, rank=0, norm=2.0, error=0.2, quantization_error=0.2)
    adapted = MatrixReport(name="layers.0.v_proj", rows=6, columns=4, rank=2, error=0.1, quantization_error=0.2)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"matrices": [only.as_dict(), adapted.as_dict()]}))
    assert main(["report", str(report), "--picture", str(tmp_path / "report.png")]) == 0
    _, first, second = capsys.readouterr().out.splitlines()[:3]
    assert first.split() == ["q_proj", "1", "6", "x", "4", "-", "-", "-", "-", "-", "1.00e-01", "-", "-", "0.0"]
    assert second.split()[5] == "2"
    assert "50.0%" in second
    figures = ["report", str(report), "--json", str(tmp_path / "figures.json")]
    assert main(figures) == 0
    assert main(figures) == 1
    assert "figures.json: exists; choose another path or pass overwrite" in capsys.readouterr().err
    assert main([*figures, "--picture", str(tmp_path / "report.png"), "--overwrite"]) == 0


def test_no_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Virtual tokens beside dense weights."""
    assert as_table([]) == "No matrix was decomposed or stored in a residual format."
    (tmp_path / "lowrank_dist.json").write_text(json.dumps({"matrices": []}))
    assert main(["report", str(tmp_path)]) == 1
    assert "decomposed no matrix and stored none in a residual format" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory, and in it a checkpoint with a manifest."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step=2"
    checkpoint.mkdir(parents=True)
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]
    matrices = [
        MatrixReport(
            name=name,
            rows=6,
            columns=4,
            rank=2,
            norm=2.0,
            error=0.1 + 0.01 * i,
            quantization_error=0.2,
            sigma_1=2.0,
            sigma_r=1.0,
            singular_values=[2.0, 1.0],
        ).as_dict()
        for i, name in enumerate(names)
    ]
    manifest = {"matrices": matrices, "method": "<b>pissa</b>"}
    (checkpoint / "lowrank_dist.json").write_text(json.dumps(manifest))
    history = {"train": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], "validation": [{"step": 2, "loss": 1.6}]}
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    table = "step,throughput/tokens_per_s,train_loss\n1,100.0,\n2,110.5,1.5\n"
    (tmp_path / "run" / "metrics.csv").write_text(table)
    return checkpoint


def test_a_page_is_complete_in_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{page}, with {run.parents[1] / 'history.json'} and {run.parents[1] / 'metrics.csv'}"
    text = page.read_text()
    titles = re.findall(r'<img alt="(.*?)" src="data:image/svg\+xml;base64,(.*?)">', text)
    assert [title for title, _ in titles] == [
        "loss",
        "throughput",
        "error / norm",
        "error reduction, Frobenius",
        "sigma_1 / sigma_r",
        "singular values in the factors",
    ]
    assert all(b"<svg" in base64.b64decode(data) for _, data in titles)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # nothing is fetched
    assert "&lt;b&gt;pissa&lt;/b&gt;" in text
    assert "<b>" not in text
    assert main(["report", str(run), "--html", str(page)]) == 1
    assert main(["report", str(run), "--html", str(page), "--overwrite"]) == 0


@pytest.mark.parametrize("option", ["--history", "--metrics"])
def test_records_without_a_page_are_refused(option: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), option, "/no/such"]) == 1
    assert f"{option} /no/such has no effect without --html; leave it out" in capsys.readouterr().err
    assert main(["report", str(run), option, "/no/such", "--html", str(run / "page.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_does_not_replace_what_it_is_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (run / "lowrank_dist.json", run.parents[1] / "history.json"):
        before = file.read_bytes()
        assert main(["report", str(run), "--html", str(file), "--overwrite"]) == 1
        assert f"--html {file} is what the command reads too" in capsys.readouterr().err
        assert file.read_bytes() == before


def test_records_that_are_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, error in (
        ("--history", '{"train": [{"step": "one", "loss": 1}], "validation": []}', "step"),
        ("--metrics", "step,throughput/tokens_per_s\none,2\n", "not a table of CSVLogger"),
        ("--metrics", "throughput/tokens_per_s\n2\n", "not a table of CSVLogger"),
    ):
        (tmp_path / "bad").write_text(text)
        assert main(["report", str(run), "--html", str(tmp_path / "page.html"), name, str(tmp_path / "bad")]) == 1
        assert error in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()
