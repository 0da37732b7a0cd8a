"""Headers and indices of safetensors files; no weights, and no torch, whose import takes longer than a command may."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lowrank_dist.errors import CheckpointError, is_passing
from lowrank_dist.storage.parse import (
    LFS_POINTER,
    MAX_HEADER,
    is_object_of,
    is_plain,
    is_text,
    open_regular,
    printable,
    read_record,
    refuse_pointer,
)

INDEX_NAME = "model.safetensors.index.json"


def open_file(path: Path, framework: Literal["pt", "numpy"] = "pt") -> Any:
    """Open a safetensors file and check its header against its length; see ``safetensors.safe_open``.

    `framework` is that of the tensors that are read; NumPy suffices for headers, and torch is not imported.

    Raises
    ------
    CheckpointError
        If it is truncated or damaged.
    """
    with open(open_regular(path), "rb") as file:
        size, begin = os.fstat(file.fileno()).st_size, file.read(len(LFS_POINTER))
    refuse_pointer(path, begin)
    header = int.from_bytes(begin[:8], "little")
    try:
        if header > min(MAX_HEADER, size - 8):  # not opened: the header would be read whole
            raise ValueError(f"a header of {header} bytes")
        opened = safe_open(path, framework=framework)
        odd = next((name for name in opened.keys() if not is_plain(name)), None)  # noqa: SIM118 (no dictionary)
        if odd is not None:
            raise ValueError(f"a tensor is called {printable(odd)!r}")
        return opened
    except (SafetensorError, ValueError, OSError) as error:
        if is_passing(error):
            raise
        raise CheckpointError(
            f"{path}: {size} bytes, truncated or corrupt ({printable(error)}); fetch it again"
        ) from error


def read_index(path: Path) -> dict[str, str]:
    """Names of the tensors, and of the files beside the index that hold them.

    Raises
    ------
    CheckpointError
        If it is no index, or names files elsewhere.
    """

    def is_beside(file: Any) -> bool:
        return is_text(file) and file == os.path.basename(file) and file.endswith(".safetensors")

    found = read_record(path).expect("weight_map", is_object_of(is_beside), "safetensors files beside it by tensor")
    return dict(found)
