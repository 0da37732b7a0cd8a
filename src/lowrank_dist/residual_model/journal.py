"""The journal of a residual model that is being written: which matrices are complete, and sums of their bytes.

Rank 0 writes it, after the bytes of a matrix have reached the disk. A run that continues a killed one starts from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import check_matrix
from lowrank_dist.storage.parse import (
    MAX_MANIFEST,
    Record,
    is_integer,
    is_list_of,
    is_object_of,
    parse_object,
    read_bytes,
)

JOURNAL = "journal.jsonl"

#: Sums of the pieces of tensors (`lowrank_dist.storage.digest.piece_sums`) by stem of the files and name.
Sums = dict[str, dict[str, list[int]]]


class Journal:
    """JSON lines: the fingerprint of a residual model, then the report of every complete matrix with its sums.

    Parameters
    ----------
    directory
        Directory that the residual model is built in.
    key
        Its fingerprint.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.path, self.key = directory / JOURNAL, key

    def create(self) -> None:
        """Begin the journal of a model of which nothing is complete."""
        self.path.write_text(json.dumps(self._head()) + "\n")

    def _head(self) -> dict[str, str]:
        return {"fingerprint": self.key}

    def entries(self) -> list[dict[str, Any]] | None:
        """What is complete; None if there is no journal of this fingerprint.

        The last line may be incomplete: the run may have been killed while it wrote it.
        """
        if not self.path.is_file():
            return None
        found: list[dict[str, Any]] = []
        try:
            for line in read_bytes(self.path, MAX_MANIFEST).splitlines():
                entry = Record(parse_object(line, str(self.path)), str(self.path))
                if found:
                    check_matrix(entry)
                    sums_of(entry)
                found.append(entry)
        except CheckpointError:
            pass
        return found[1:] if found and found[0] == self._head() else None

    def record(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append what has become complete, and flush it to the disk."""
        with open(self.path, "a") as journal:
            journal.writelines(json.dumps(entry) + "\n" for entry in entries)
            journal.flush()
            os.fsync(journal.fileno())

    def remove(self) -> None:
        """Remove the journal, if it is there: the next run begins anew."""
        self.path.unlink(missing_ok=True)


def sums_of(entry: Mapping[str, Any]) -> Sums:
    """The sums of an entry.

    Raises
    ------
    CheckpointError
        If the entry has none, or others.
    """
    found: Sums = Record(entry, JOURNAL).expect("sums", is_object_of(is_object_of(_is_pair)), "sums by file and tensor")
    return found


def _is_pair(value: Any) -> bool:
    return is_list_of(lambda half: is_integer(half, 0, 2**64 - 1))(value) and len(value) == 2


def add(sums: dict[str, list[int]], name: str, part: Sequence[int]) -> None:
    """Add the sums of a part of a tensor to those of the tensor."""
    sums[name] = [(a + b) % 2**64 for a, b in zip(sums.get(name, [0, 0]), part, strict=True)]


def total(parts: Iterable[Sums]) -> Sums:
    """Add sums of several parts, of ranks or of matrices."""
    found: Sums = {}
    for part in parts:
        for stem, sums in part.items():
            for name, pair in sums.items():
                add(found.setdefault(stem, {}), name, pair)
    return found
