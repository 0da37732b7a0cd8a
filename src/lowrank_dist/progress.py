"""Progress bars for long operations."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, show: bool, doing: str = "Decomposing") -> tqdm[Any]:
    """A progress bar over `total` bytes: bytes processed, throughput and time left; disabled unless `show`."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not show)


def count_bar(total: int, *, show: bool, doing: str) -> tqdm[Any]:
    """A progress bar over `total` things; disabled unless `show`."""
    return tqdm(total=total, desc=doing, disable=not show)
