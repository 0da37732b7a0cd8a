"""Progress bars of long work."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, show: bool, doing: str = "Decomposing") -> tqdm[Any]:
    """Bytes of the checkpoint that are done, throughput and time left."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not show)
