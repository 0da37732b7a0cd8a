"""What a terminal shows: progress bars for long operations, and tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, show: bool, doing: str = "Decomposing") -> tqdm[Any]:
    """A progress bar over `total` bytes: bytes processed, throughput and time left; disabled unless `show`."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not show)


def count_bar(total: int, *, show: bool, doing: str) -> tqdm[Any]:
    """A progress bar over `total` things; disabled unless `show`."""
    return tqdm(total=total, desc=doing, disable=not show)


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), ruled: bool = False) -> list[str]:
    """Lines of a table whose columns stand below each other.

    Parameters
    ----------
    rows
        Cells, as many in every row.
    right
        Columns that end below each other; the others begin there.
    ruled
        Draw a line of dashes below the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
