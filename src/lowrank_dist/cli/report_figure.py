"""The figures of a report: heat maps over layers and layer types, spectra, and curves of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lowrank_dist.decomposition.report import MatrixReport, layer_type
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Draws one panel.
Panel = Callable[["Axes"], None]

_MAPS: dict[str, Callable[[MatrixReport], float | None]] = {
    "error / norm": lambda m: m.relative_error,
    "error reduction, Frobenius": lambda m: m.error_reduction if m.rank and m.quantization_error else None,
    "error reduction, nuclear": lambda m: m.nuclear_reduction,
    "energy in the factors": lambda m: m.captured_energy,
    "sigma_1 / sigma_r": lambda m: m.sigma_1 / m.sigma_r if m.sigma_1 and m.sigma_r else None,
}
_COLUMNS = 3  # panels beside each other
#: Of lines and their points, so that a print in grey can be read.
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")


def panels(matrices: Sequence[MatrixReport], rank_by_layer: Mapping[str, int] | None = None) -> dict[str, Panel]:
    """A panel for every measured figure, with its title: a heat map of layers and layer types, and the spectra.

    `rank_by_layer` adds one of the ranks that the adapter keeps.
    """
    found: dict[str, dict[str, float | None]] = {
        title: {matrix.name: value(matrix) for matrix in matrices} for title, value in _MAPS.items()
    }
    found["rank that is kept"] = dict(rank_by_layer or {})
    names = list(dict.fromkeys([*(matrix.name for matrix in matrices), *(rank_by_layer or {})]))
    types, layers = list(dict.fromkeys(map(layer_type, names))), sorted(set(map(_layer, names)))
    shown = {
        title: _heat_map(values, types, layers)
        for title, values in found.items()
        if any(value is not None for value in values.values())
    }
    spectra = [matrix for matrix in matrices if matrix.singular_values]
    if spectra:
        shown["singular values in the factors"] = _spectra(spectra)
    return shown


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], *, unit: str, marked: Sequence[str] = ()) -> Panel:
    """A panel of points by step; those of `marked` are drawn as markers."""

    def draw(axes: Axes) -> None:
        for index, (name, points) in enumerate(lines.items()):
            style = {"marker": "o", "linestyle": "none"} if name in marked else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), label=name, color=f"C{index}", **style)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return draw


def figure_of(shown: Mapping[str, Panel]) -> Figure:
    """One figure with all panels, in rows of three."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"pictures need matplotlib ({error}); install it, or lowrank-dist[demo]") from error

    # the object interface: no pyplot, no global state, no display
    columns = min(_COLUMNS, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(5.2 * columns, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (title, draw), ax in zip(shown.items(), axes, strict=False):
        draw(ax)
        ax.set_title(title, fontsize=11)
        ax.tick_params(labelsize=8)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    return figure


def _heat_map(values: Mapping[str, float | None], types: Sequence[str], layers: Sequence[int]) -> Panel:
    def draw(axes: Axes) -> None:
        grid = [[float("nan")] * len(types) for _ in layers]
        for name, value in values.items():
            if value is not None:
                grid[layers.index(_layer(name))][types.index(layer_type(name))] = value
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_xticks(range(len(types)), types, rotation=45, ha="right", rotation_mode="anchor")
        every = max(1, math.ceil(len(layers) / 12))
        rows = range(0, len(layers), every)
        axes.set_yticks(rows, ["-" if layers[row] < 0 else str(layers[row]) for row in rows])
        axes.set_ylabel("layer", fontsize=9)
        assert axes.figure is not None
        bar = axes.figure.colorbar(image, ax=axes)
        bar.ax.tick_params(labelsize=8)

    return draw


def _spectra(matrices: Sequence[MatrixReport]) -> Panel:
    def draw(axes: Axes) -> None:
        kinds = list(dict.fromkeys(layer_type(matrix.name) for matrix in matrices))
        for index, kind in enumerate(kinds):
            for number, matrix in enumerate(m for m in matrices if layer_type(m.name) == kind):
                values = matrix.singular_values or []
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    color=f"C{index % 10}",
                    linestyle=STYLES[index % len(STYLES)],
                    alpha=0.45,
                    linewidth=0.8,
                    label=kind if number == 0 else None,
                )
        axes.set_yscale("log")
        axes.set_xlabel("index", fontsize=9)
        legend = axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        for line in legend.get_lines():
            line.set(alpha=1, linewidth=1.6)

    return draw


def _layer(name: str) -> int:
    """Index of the layer in a module's name; -1 outside layers."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else -1
