"""``lowrank-dist report``: print the report of an initialisation; write it as JSON or draw it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.decomposition.report import MatrixReport, as_table, layer_type, ranks_as_table
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.storage.atomic import atomic_file
from lowrank_dist.storage.layout import MANIFEST, checked_manifest
from lowrank_dist.storage.parse import MAX_MANIFEST, read_record
from lowrank_dist.storage.replacing import check_file
from lowrank_dist.storage.writer import write_report


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist report``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    for file in filter(None, (options.json, options.picture)):
        check_file(Path(file), overwrite=options.overwrite)
    matrices, rank_by_layer = read_report(Path(options.directory))
    tables = [as_table(matrices)] if matrices else []
    if rank_by_layer:
        tables.append(f"Ranks that the adapter keeps:\n{ranks_as_table(rank_by_layer)}")
    print("\n\n".join(tables))
    if options.json is not None:
        figures: dict[str, Any] = {"matrices": [matrix.as_dict() for matrix in matrices]}
        figures |= {"rank_by_layer": rank_by_layer} if rank_by_layer else {}
        write_report(Path(options.json), figures, overwrite=options.overwrite)
    if options.picture is not None:
        print(draw(matrices, Path(options.picture), rank_by_layer, overwrite=options.overwrite))
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist report``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist report",
        description="Print a table, by layer type, of what an initialisation measured, and of the ranks of AdaLoRA.",
    )
    parser.add_argument("directory", help="residual model, checkpoint of AdapterCheckpoint, or JSON of InitReport")
    parser.add_argument("--json", help="file to write the figures of every matrix to")
    parser.add_argument("--picture", help="PNG to draw: heat maps layer x type, spectra")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --json and --picture")
    return parser


def read_report(path: Path) -> tuple[list[MatrixReport], dict[str, int]]:
    """The report stored in a residual model, in a checkpoint, or in a JSON file that `InitReport` wrote.

    The second result has the ranks that the adapter of a checkpoint keeps by layer, if they change while it is trained.
    """
    file = path / MANIFEST if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(
            f"{path}: holds no {MANIFEST}; pass a residual model, a directory that AdapterCheckpoint wrote, or the "
            "JSON of InitReport"
        )
    manifest = checked_manifest(read_record(file, MAX_MANIFEST))
    if "matrices" not in manifest:
        raise CheckpointError(f"{file}: not a report: it has no entry 'matrices'")
    entries, rank_by_layer = manifest.records("matrices"), dict[str, int](manifest.record("rank_by_layer"))
    if not entries and not rank_by_layer:
        raise CheckpointError(
            f"{file}: the run decomposed no matrix and stored none in a residual format, so that there is nothing to "
            "report"
        )
    return [MatrixReport.from_dict(entry) for entry in entries], rank_by_layer


def draw(
    matrices: list[MatrixReport],
    path: Path,
    rank_by_layer: Mapping[str, int] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Draw heat maps of every measured figure over layers and layer types, and the singular values in the factors.

    `rank_by_layer` adds one of the ranks that the adapter keeps.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"--picture needs matplotlib ({error}); install it, or lowrank-dist[demo]") from error

    # the object interface: no pyplot, no global state, no display
    names = list(dict.fromkeys([*(matrix.name for matrix in matrices), *(rank_by_layer or {})]))
    types = list(dict.fromkeys(map(layer_type, names)))
    layers = sorted(set(map(_layer, names)))
    maps: dict[str, Callable[[MatrixReport], float | None]] = {
        "error / norm": lambda m: m.relative_error,
        "error reduction, Frobenius": lambda m: m.error_reduction if m.rank and m.quantization_error else None,
        "error reduction, nuclear": lambda m: m.nuclear_reduction,
        "energy in the factors": lambda m: m.captured_energy,
        "sigma_1 / sigma_r": lambda m: m.sigma_1 / m.sigma_r if m.sigma_1 and m.sigma_r else None,
    }
    figures = {title: {matrix.name: value(matrix) for matrix in matrices} for title, value in maps.items()}
    figures["rank that is kept"] = dict(rank_by_layer or {})
    shown = {title: found for title, found in figures.items() if any(value is not None for value in found.values())}
    spectra = [matrix for matrix in matrices if matrix.singular_values]
    panels = len(shown) + bool(spectra)
    figure = Figure(figsize=(1.2 + 3.4 * panels, 1.5 + max(2.5, 0.16 * len(layers))), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(1, max(panels, 1), squeeze=False)[0]
    for ax, (title, found) in zip(axes, shown.items(), strict=False):
        grid = [[float("nan")] * len(types) for _ in layers]
        for name, value in found.items():
            if value is not None:
                grid[layers.index(_layer(name))][types.index(layer_type(name))] = value
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
        ax.set_title(title, fontsize=9)
        ax.set_xticks(range(len(types)), types, rotation=60, ha="right", fontsize=7)
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel("layer", fontsize=8)
        figure.colorbar(image, ax=ax)
    if spectra:
        ax = axes[-1]
        for index, kind in enumerate(types):
            for matrix in (m for m in spectra if layer_type(m.name) == kind):
                label = kind if matrix is next(m for m in spectra if layer_type(m.name) == kind) else None
                values = matrix.singular_values or []
                ax.plot(range(1, len(values) + 1), values, color=f"C{index % 10}", alpha=0.4, lw=0.7, label=label)
        ax.set_yscale("log")
        ax.set_title("singular values in the factors", fontsize=9)
        ax.set_xlabel("index", fontsize=8)
        ax.legend(fontsize=6)
    with atomic_file(path, overwrite=overwrite) as fresh:
        figure.savefig(fresh, dpi=120, format="png")
    return path


def _layer(name: str) -> int:
    """Index of the layer in a module's name; -1 outside layers."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else -1
