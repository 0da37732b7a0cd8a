"""Progress bars for long operations."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, show: bool, doing: str = "Decomposing") -> tqdm[Any]:
    """Return a bar over `total` bytes that shows the bytes done, the throughput and the time left."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not show)
