"""What the initialisation did, on the screen and as JSON."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lowrank_dist.checkpoint_io import write_json
from lowrank_dist.materialize import InitReport as Measurements
from lowrank_dist.materialize import MatrixReport


class InitReport(Callback):
    """Print a table of the initialisation per layer type once the model is set up, and write it as JSON.

    Parameters
    ----------
    path
        JSON file to write, with one entry per matrix; relative to the trainer's ``default_root_dir``. None: only print.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._told: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = getattr(trainer.strategy, "init_report", None)
        if report is None or report is self._told:
            return
        self._told = report
        rank_zero_info(as_table(report))
        if self.path is not None and trainer.is_global_zero:
            path = Path(trainer.default_root_dir, self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, report.as_dict())


def as_table(report: Measurements) -> str:
    """One line per layer type: matrices, shape, rank, relative error at step 0, error reduction, seconds."""
    groups: dict[tuple[str, int, int, int], list[MatrixReport]] = defaultdict(list)
    for matrix in report.matrices:
        groups[matrix.name.rsplit(".", 1)[-1], matrix.rows, matrix.columns, matrix.rank].append(matrix)
    lines = [
        f"{'layer':<16}{'matrices':>9}{'shape':>15}{'rank':>6}{'rel. error':>12}{'error reduction':>17}{'seconds':>9}"
    ]
    for (layer, rows, columns, rank), members in sorted(groups.items()):
        error = _mean([m.error / m.norm if m.norm else 0.0 for m in members])
        reduction = _mean([m.error_reduction for m in members])
        seconds = sum(m.seconds for m in members)
        shape = f"{rows} x {columns}"
        lines.append(f"{layer:<16}{len(members):>9}{shape:>15}{rank:>6}{error:>12.2e}{reduction:>17.1%}{seconds:>9.1f}")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
