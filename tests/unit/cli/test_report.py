"""``lowrank-dist report`` of runs whose adapters are not made from the weights."""

from __future__ import annotations

import json
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
