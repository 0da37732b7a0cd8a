"""Markdown of the reports: where and with what figures were taken, tables, verdicts."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def header(title: str, script: str, packages: Sequence[str], machine: str, notes: Sequence[str]) -> str:
    """The command, date, commit, versions and processor of a run.

    Parameters
    ----------
    title
        Of the report.
    script
        Name of the program in ``benchmarks/``.
    packages
        Whose versions count, where they are installed.
    machine
        How the processors were used.
    notes
        Further lines.
    """
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages if _installed(name))
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"`{' '.join([f'python benchmarks/{script}', *sys.argv[1:]])}`",
        f"{now:%Y-%m-%d %H:%M} UTC, commit {_commit()}, Python {platform.python_version()}, {versions}",
        f"{_processor()}, {os.cpu_count()} logical CPUs; {machine}; load average at the start {os.getloadavg()[0]:.1f}",
        *notes,
    ]
    return f"# {title}\n\n" + "\n".join(f"- {line}" for line in lines)


def write_report(output: Path, parts: Sequence[str], *, dry: bool) -> None:
    """Write a report; that of a dry run goes to ``runs/dry`` where it would replace what was measured."""
    if dry and output.resolve().parent == RESULTS:
        output = ROOT / "runs" / "dry" / output.name
        print(f"a dry run: {output}", file=sys.stderr)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(parts) + "\n")


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def verdict(met: bool) -> str:
    return "**met**" if met else "**missed**"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changes = " with changes" if git("status", "--porcelain") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changes


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
