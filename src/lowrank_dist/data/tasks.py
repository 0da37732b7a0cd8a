"""What the examples of a data module are for."""

from __future__ import annotations

from typing import Literal

Task = Literal["sft", "preference", "classification"]
"""``"sft"``: responses; ``"preference"``: pairs of a chosen and a rejected response; ``"classification"``: classes."""

PER_ITEM: dict[str, int] = {"sft": 1, "preference": 2, "classification": 1}
"""Examples of an item: that of a pair has the chosen one first."""
