"""The benchmarks run: a dry run at tiny scale, without a word on time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_at_tiny_scale(tmp_path: Path) -> None:
    output = tmp_path / "init.md"
    command = [sys.executable, "benchmarks/bench_init.py", "--tiny", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = output.read_text()
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
    assert "dry run" in report
