"""Iterators over records of training data, from files and from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_dist.errors import InputError, is_passing


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", record)`` for every line of a JSONL file.

    Raises
    ------
    InputError
        If a line is empty, is not UTF-8 JSON, or is not an object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                raise InputError(f"{where}: empty line; every line must hold one JSON object")
            try:
                record = json.loads(line)
            except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                raise InputError(f"{where}: not valid JSON ({error}); every line must hold one JSON object") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: a JSON {type(record).__name__}; every line must hold one JSON object")
            yield where, record


def read_hub(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("id[split] row i", record)`` for every row of a Hugging Face data set.

    Raises
    ------
    ImportError
        If the `datasets` library is missing.
    InputError
        If the data set, its subset or its split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and data sets of the Hugging Face hub need the `datasets` library: "
            "`pip install lowrank-dist[datasets]`, or give the path of a .jsonl file"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (ValueError, OSError) as error:  # unknown id, subset or split; no network
        if is_passing(error):
            raise
        raise InputError(
            f"{name!r} is not a file, and the Hugging Face data set of this name (subset={subset!r}, split={split!r}) "
            f"cannot be loaded: {error}"
        ) from error
    for index, record in enumerate(rows):
        yield f"{name}[{split}] row {index}", record
