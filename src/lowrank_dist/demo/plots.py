"""The figure of the demonstration: the loss curve, and the reduction of the quantization error per layer type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.storage.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_demo"]

# attention before MLP, in the order of a block; other names follow alphabetically
_LAYER_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TRAIN, _ATTENTION, _OTHER, _GREY = "#3b6ea5", "#3b6ea5", "#d9822b", "#555555"


def plot_demo(
    history: Mapping[str, Any], init_report: Iterable[Mapping[str, Any]], path: str | Path, *, title: str | None = None
) -> Path:
    """Draw the loss curve and the error reduction per layer type side by side.

    Parameters
    ----------
    history
        ``step`` and ``train_loss``, two lists of equal length. The evaluation losses of ``summary.json`` are drawn
        where present: ``eval_loss_base`` as a horizontal line, ``eval_loss_step0``, ``eval_loss_trained`` and
        ``eval_loss_converted`` as markers at the first and the last step, the latter beside it.
    init_report
        One mapping per decomposed matrix with ``name`` (such as ``model.layers.0.self_attn.q_proj``), ``rows``,
        ``columns`` and ``error_reduction`` (a fraction). Matrices whose names have the same last component form one
        bar: their mean, with the range from the lowest to the highest.
    path
        PNG file to write; its directory is created. The file is complete or absent.
    title
        Line above both panels.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        If a list is empty or the two lists of the history differ in length.
    """
    # pyplot has global state and may need a display; the object interface does not
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = list(history["step"]), list(history["train_loss"])
    if len(steps) != len(losses) or not steps:
        raise ValueError(
            f"history has {len(steps)} steps and {len(losses)} train losses; give two lists of equal, positive length"
        )
    groups = _by_layer_type(init_report)
    if not groups:
        raise ValueError("the init report is empty; give one mapping per decomposed matrix")

    figure = Figure(figsize=(12.5, 5.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_loss(left, steps, losses, history)
    _draw_reduction(right, groups)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)

    path = Path(path)
    with atomic_file(path, overwrite=True) as fresh:
        figure.savefig(fresh, format="png")
    return path


def _by_layer_type(init_report: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in init_report:
        groups.setdefault(str(row["name"]).rsplit(".", 1)[-1], []).append(row)
    known = {name: position for position, name in enumerate(_LAYER_ORDER)}
    return dict(sorted(groups.items(), key=lambda item: (known.get(item[0], len(known)), item[0])))


def _draw_loss(axes: Axes, steps: list[int], losses: list[float], history: Mapping[str, Any]) -> None:
    axes.plot(steps, losses, color=_TRAIN, linewidth=1.0, alpha=0.45, label="training, each step")
    if len(steps) >= 10:
        window = 2 * (len(steps) // 16) + 3
        axes.plot(steps, _running_mean(losses, window), color=_TRAIN, linewidth=2, label=f"training, mean of {window}")
    if history.get("eval_loss_base") is not None:
        base = history["eval_loss_base"]
        axes.axhline(base, color=_GREY, linestyle="--", linewidth=1.2, label=f"held out, base model: {base:.3f}")
    markers = (
        ("eval_loss_step0", 0, "o", "#8e44ad", 8, "before step 1"),
        ("eval_loss_trained", steps[-1], "D", "#c0392b", 10, "trained"),
        ("eval_loss_converted", 1.035 * steps[-1], "X", "#1e8449", 10, "converted LoRA, original base"),
    )
    for key, step, marker, color, size, label in markers:
        if history.get(key) is not None:
            axes.plot(
                [step],
                [history[key]],
                marker=marker,
                markersize=size,
                markeredgecolor="white",
                markeredgewidth=0.7,
                color=color,
                linestyle="none",
                zorder=3,
                clip_on=False,
                label=f"held out, {label}: {history[key]:.3f}",
            )
    axes.set(title="Loss on completions", xlabel="optimizer step", ylabel="cross-entropy per token (nats)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, steps[-1] * 1.06)
    axes.grid(axis="y", alpha=0.25)
    # below the panel: inside, the lines that it explains run through it
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over `window` (odd) values; towards both ends the window shrinks and stays centred."""
    halves = (min(window // 2, i, len(values) - 1 - i) for i in range(len(values)))
    parts = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    return [sum(part) / len(part) for part in parts]


def _draw_reduction(axes: Axes, groups: Mapping[str, list[Mapping[str, Any]]]) -> None:
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    tallest = max(100 * float(row["error_reduction"]) for rows in groups.values() for row in rows)
    labels = []
    for position, (name, rows) in enumerate(groups.items()):
        values = [100 * float(row["error_reduction"]) for row in rows]
        mean = sum(values) / len(values)
        spread = [[mean - min(values)], [max(values) - mean]]
        axes.bar(
            position,
            mean,
            width=0.7,
            color=_ATTENTION if name in attention else _OTHER,
            yerr=spread,
            error_kw={"ecolor": _GREY, "elinewidth": 1, "capsize": 3},
        )
        # beside the line of the range, which would run through it
        axes.text(
            position + 0.05,
            mean + 0.01 * tallest,
            f"{mean:.1f}",
            ha="left",
            va="bottom",
            fontsize=9,
            fontweight="bold",
        )
        shapes = {(int(row["rows"]), int(row["columns"])) for row in rows}
        labels.append(f"{name}\n" + (f"{min(shapes)[0]}×{min(shapes)[1]}" if len(shapes) == 1 else "several shapes"))
    axes.set_xticks(range(len(groups)), labels, fontsize=7.5, rotation=0 if len(groups) <= 8 else 60)
    matrices = sum(len(rows) for rows in groups.values())
    axes.set(
        title="Quantization error removed by the adapter",
        xlabel=f"layer type and shape: mean and range, {matrices} matrices in all",
        ylabel="error reduction against NF4 alone (%, Frobenius)",
    )
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.axhline(0, color="black", linewidth=0.8)
