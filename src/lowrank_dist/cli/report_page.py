"""A report as one page of HTML without anything beside it: figures, tables and settings, to send to a colleague."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowrank_dist._version import __version__
from lowrank_dist.cli.report_figure import Panel, curves, figure_of, panels
from lowrank_dist.decomposition.report import MatrixReport, as_table, ranks_as_table
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.parse import MAX_JSON, Record, is_number, printable, read_bytes, read_record

HISTORY, METRICS = "history.json", "metrics.csv"
_NOT_SETTINGS = ("matrices", "rank_by_layer", "hashes", "tensors")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
pre { font-size: 0.8rem; overflow-x: auto; }
td, th { padding: 0.15rem 0.8rem 0.15rem 0; text-align: left; vertical-align: top; }
td pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: 1rem; }
.figures img { width: 100%; background: white; border: 1px solid #8884; border-radius: 6px; }
footer { margin-top: 3rem; font-size: 0.85rem; opacity: 0.75; }
@media print { .figures { grid-template-columns: 1fr 1fr; } img, tr { break-inside: avoid; } }
""".strip()


def find(directory: Path, name: str) -> Path | None:
    """The file `name` in the directory of a report, or at most two above it, where a run has its records."""
    start = directory if directory.is_dir() else directory.parent
    return next((place / name for place in (start, *start.absolute().parents[:2]) if (place / name).is_file()), None)


def page(
    source: Path,
    manifest: Mapping[str, Any],
    matrices: Sequence[MatrixReport],
    rank_by_layer: Mapping[str, int],
    *,
    history: Path | None = None,
    metrics: Path | None = None,
) -> str:
    """The page.

    Parameters
    ----------
    source
        What the report is of; its name is the title.
    manifest
        The manifest or report, whose entries other than those of matrices are listed as settings.
    matrices, rank_by_layer
        What was measured, and the ranks that the adapter keeps.
    history
        JSON of `LossHistory`.
    metrics
        CSV of Lightning's ``CSVLogger``, with the figures of `StepMonitor`.
    """
    shown: dict[str, Panel] = {}
    notes = []
    if history is not None:
        shown |= _losses(history)
        notes.append(f"Losses: {history}")
    if metrics is not None:
        shown |= _throughput(metrics)
        notes.append(f"Throughput: {metrics}")
    shown |= panels(matrices, rank_by_layer)
    title = printable(source.absolute().name)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(printable(source, 1000))}</p>"]
    if shown:
        parts += ["<h2>Figures</h2>", '<div class="figures">', *(_image(*panel) for panel in shown.items()), "</div>"]
    if matrices:
        parts += ["<h2>By layer type</h2>", f"<pre>{escape(as_table(list(matrices)))}</pre>"]
    if rank_by_layer:
        parts += ["<h2>Ranks that the adapter keeps</h2>", f"<pre>{escape(ranks_as_table(rank_by_layer))}</pre>"]
    parts += ["<h2>Settings</h2>", "<table>", *_settings(manifest), "</table>"]
    footer = "<br>".join(escape(printable(note, 1000)) for note in [*notes, f"lowrank_dist {__version__}"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def _image(title: str, panel: Panel) -> str:
    """A panel as an image in the page."""
    buffer = io.BytesIO()
    figure_of({title: panel}).savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _settings(manifest: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, value in manifest.items():
        if name not in _NOT_SETTINGS and value not in (None, {}, []):
            text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
            rows.append(f"<tr><th>{escape(printable(name))}</th><td><pre>{escape(_lines(text))}</pre></td></tr>")
    return rows


def _lines(text: str, most: int = 40) -> str:
    """Text without control characters, cut after some lines."""
    lines = [printable(line, 2000) for line in text.split("\n")]
    return "\n".join(lines[:most] + ([f"... {len(lines) - most} lines more"] if len(lines) > most else []))


def _losses(file: Path) -> dict[str, Panel]:
    found = read_record(file)
    lines = {}
    for part in ("train", "validation"):
        entries = [Record(entry, f"{file}: {part}") for entry in found.records(part)]
        points = [
            (
                entry.expect("step", is_number, "a number"),
                entry.expect("loss", lambda loss: is_number(loss) or loss is None, "a number"),
            )
            for entry in entries
        ]
        points = [(step, loss) for step, loss in points if loss is not None and math.isfinite(loss)]
        if points:
            lines[part] = points
    return {"loss": curves(lines, unit="nats per token", marked=["validation"])} if lines else {}


def _throughput(file: Path) -> dict[str, Panel]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(file, MAX_JSON).decode("utf-8"))))
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for name, value in row.items():
                if value and str(name).startswith("throughput/"):
                    point = float(row["step"]), float(value)
                    if all(map(math.isfinite, point)):
                        found.setdefault(str(name).removeprefix("throughput/"), []).append(point)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a table of CSVLogger ({printable(error)})") from error
    names: tuple[str, ...] = ("tokens_per_s", "trained_tokens_per_s")
    tokens = {name: found[name] for name in names if name in found}
    return {"throughput": curves(tokens, unit="tokens per second")} if tokens else {}
